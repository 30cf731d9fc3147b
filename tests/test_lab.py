"JupyterLab in a real browser opens a notebook of ours and runs it from top to bottom."
import json, os, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path
import pytest
from conftest import needs_system
from notebooks import NBS, ROOT

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
CHROMIUM_FLAGS = '--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update'.split()
LAB_FLAGS = ('--no-browser --allow-root --ip=127.0.0.1 --ServerApp.port_retries=0 --IdentityProvider.token= --ServerApp.password= '
             '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate --LabApp.extension_manager=readonly').split()

def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def home(folder: Path) -> dict[str, str]:
    "An environment in which Jupyter finds none of the user's settings, and asks nothing about news."
    settings = folder/'settings/@jupyterlab/apputils-extension'; settings.mkdir(parents=True)
    (settings/'notification.jupyterlab-settings').write_text('{"fetchNews": "false", "checkForUpdates": false}')
    places = dict(HOME='.', JUPYTER_CONFIG_DIR='config', JUPYTER_DATA_DIR='data', JUPYTER_RUNTIME_DIR='runtime',
                  IPYTHONDIR='ipython', JUPYTERLAB_SETTINGS_DIR='settings')
    return {name: str(folder/place) for name, place in places.items()}

def wait_for(url: str, process: subprocess.Popen, log: Path):
    for _ in range(240):
        assert process.poll() is None, log.read_text()[-3000:]
        try: return urllib.request.urlopen(f'{url}/api', timeout=2)
        except OSError: time.sleep(0.5)
    pytest.fail(f'JupyterLab did not answer:\n{log.read_text()[-3000:]}')

@pytest.fixture
def lab(tmp_path):
    "A running JupyterLab whose folder holds one notebook of ours, without its outputs."
    notebook = json.loads((NBS/'00_paper.ipynb').read_text())
    for cell in notebook['cells']:
        if cell['cell_type'] == 'code': cell['outputs'] = []
    root, log = tmp_path/'root', tmp_path/'lab.log'
    root.mkdir(); (root/'paper.ipynb').write_text(json.dumps(notebook))
    port = free_port()
    command = [sys.executable, '-m', 'jupyterlab', *LAB_FLAGS, f'--port={port}', f'--ServerApp.root_dir={root}']
    env = os.environ | home(tmp_path) | dict(PYTHONPATH=str(ROOT))
    with log.open('w') as out: process = subprocess.Popen(command, env=env, stdout=out, stderr=out)
    try:
        wait_for(url := f'http://127.0.0.1:{port}', process, log)
        yield url
    finally: process.terminate(); process.wait(30)

def test_lab_runs_a_notebook(request):
    needs_system(CHROMIUM, 'no Chromium: apt-get install chromium')
    url = request.getfixturevalue('lab')
    from playwright.sync_api import expect, sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        page = browser.new_page(viewport=dict(width=1300, height=900))
        page.goto(f'{url}/lab/tree/paper.ipynb?reset', wait_until='domcontentloaded')
        page.get_by_text('Python 3 (ipykernel) | Idle').wait_for(timeout=120_000)  # before that, Run All asks for a kernel
        page.get_by_role('menuitem', name='Run', exact=True).click()
        page.get_by_text('Run All Cells', exact=True).click()
        outputs = page.locator('.jp-OutputArea-output')
        expect(outputs.get_by_text('36.0')).to_be_visible(timeout=120_000)  # the share of steps below ψ = 1
        expect(page.locator('[data-mime-type="application/vnd.jupyter.stderr"]')).to_have_count(0)
        browser.close()
