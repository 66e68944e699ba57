"""Progress bars with the time left: widgets in JupyterLab, sparse text lines elsewhere."""

from __future__ import annotations

import os
import sys

from tqdm import tqdm

TEXT_INTERVAL_S = 5.0


def bar(total: int, label: str, unit: str, done: int = 0) -> tqdm:
    """A bar over ``total`` units of which ``done`` were done by an earlier run.

    A stored widget freezes, so kernels that no browser's session started (papermill's) print text.
    """
    if "ipykernel" in sys.modules and "JPY_SESSION_NAME" in os.environ:  # set by Jupyter's server
        from tqdm.auto import tqdm as widget_bar

        return widget_bar(total=total, desc=label, unit=unit, initial=done, leave=False)
    interval = 0.1 if sys.stderr.isatty() else TEXT_INTERVAL_S
    return tqdm(
        total=total, desc=label, unit=unit, initial=done, mininterval=interval, ascii=True, ncols=90
    )
