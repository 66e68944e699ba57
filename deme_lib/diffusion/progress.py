"""Progress bars with the time left, as text: nothing that would freeze in a stored notebook."""

import os
import sys

from tqdm import tqdm


def bar(total: int, label: str, unit: str, done: int = 0, shown: bool = True) -> tqdm:
    """A bar over ``total`` units of which ``done`` were done by an earlier run.

    Where a browser shows it (Jupyter's server names the session) it goes when it is full; papermill
    and logs, which store what is printed, get few lines.
    """
    browser = "JPY_SESSION_NAME" in os.environ
    file = sys.stdout if browser else sys.stderr
    seconds = 0.2 if browser or file.isatty() else 5
    how = {"mininterval": seconds, "file": file, "leave": not browser, "ascii": True, "ncols": 90}
    how["disable"] = not shown
    return tqdm(total=total, desc=label, unit=unit, initial=done, **how)
