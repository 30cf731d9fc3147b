"What several tests share."
import atexit, os, shutil, tempfile
import pytest

PATIENCE = 3600     # Seconds after which what should have ended counts as hung; no limit is about speed, which a loaded machine lacks

def share_bytecode():
    "Where Python must not write bytecode beside its sources, the processes of the tests share a folder of it: else each of them compiles 5,000 files of torch and diffusers again."
    if not os.environ.pop('PYTHONDONTWRITEBYTECODE', ''): return
    folder = os.environ['PYTHONPYCACHEPREFIX'] = tempfile.mkdtemp(prefix='bytecode-')
    atexit.register(shutil.rmtree, folder, ignore_errors=True)

share_bytecode()

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
CHROMIUM_FLAGS = '--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update'.split()

def needs_system(
    present: bool,  # Is it there?
    reason: str,    # What is missing, and how to get it
):
    "Go on if it is there; else skip on a user's machine, and fail in CI, which has all of it (.ci/run)."
    if present: return
    if os.environ.get('CI', '').lower() in ('1', 'true'): pytest.fail(f'{reason} (CI must have it)', pytrace=False)
    pytest.skip(reason)
