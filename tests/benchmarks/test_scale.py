"""The committed plan is what its script computes from the committed records."""

import scale

from deme_lib import ROOT


def test_the_committed_plan_is_what_the_script_computes():
    assert (ROOT / "figures" / "scale.md").read_text() == scale.document()
