"What several tests share."
import os
import pytest

def needs_system(
    present: bool,  # Is it there?
    reason: str,    # What is missing, and how to get it
):
    "Go on if a system package is there; else skip on a user's machine and fail in CI, which installs it (.ci/run)."
    if present: return
    if os.environ.get('CI', '').lower() in ('1', 'true'): pytest.fail(f'{reason} (CI must have it)', pytrace=False)
    pytest.skip(reason)
