"What several tests share."
import atexit, os, shutil, tempfile
import pytest

# Seconds after which a process counts as hung; no limit is about speed, which a loaded machine lacks
PATIENCE = 3600

def share_bytecode():
    "Where Python must not write bytecode beside its sources, the processes of the tests share a folder of it: else each of them compiles 5,000 files of torch and diffusers again."
    if not os.environ.pop('PYTHONDONTWRITEBYTECODE', ''): return
    folder = os.environ['PYTHONPYCACHEPREFIX'] = tempfile.mkdtemp(prefix='bytecode-')
    atexit.register(shutil.rmtree, folder, ignore_errors=True)

share_bytecode()

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
CHROMIUM_FLAGS = ['--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking',
                  '--disable-component-update']

def needs_system(
    present: bool,  # Is it there?
    reason: str,    # What is missing, and how to get it
):
    "Without it a test is skipped on a user's machine, and fails in CI, which installs everything (.ci/run)."
    if present: return
    in_ci = os.environ.get('CI', '').lower() in ('1', 'true')
    if in_ci: pytest.fail(f'{reason} (CI must have it)', pytrace=False)
    pytest.skip(reason)
