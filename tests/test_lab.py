"JupyterLab in a real browser opens notebooks and runs them; sliders move, and pictures follow."
import json, os, socket, subprocess, sys, time, urllib.request
from contextlib import contextmanager
from pathlib import Path
from statistics import median
import pytest
from conftest import CHROMIUM, CHROMIUM_FLAGS, PATIENCE, needs_system
from notebooks import NBS, ROOT

LAB_FLAGS = ['--no-browser', '--allow-root', '--ip=127.0.0.1', '--ServerApp.port_retries=0',
             '--IdentityProvider.token=', '--ServerApp.password=', '--LabApp.extension_manager=readonly',
             '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate']

def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def home(folder: Path) -> dict[str, str]:
    "An environment in which Jupyter finds none of the user's settings and shows no news."
    settings = folder/'settings/@jupyterlab/apputils-extension'
    settings.mkdir(parents=True)
    no_news = {'fetchNews': 'false', 'checkForUpdates': False}
    (settings/'notification.jupyterlab-settings').write_text(json.dumps(no_news))
    places = dict(HOME='.', IPYTHONDIR='ipython', JUPYTER_CONFIG_DIR='config', JUPYTER_DATA_DIR='data',
                  JUPYTER_RUNTIME_DIR='runtime', JUPYTERLAB_SETTINGS_DIR='settings')
    return {name: str(folder/place) for name, place in places.items()}

def wait_for(url: str, process: subprocess.Popen, log: Path):
    end = time.time() + PATIENCE
    while time.time() < end:
        assert process.poll() is None, log.read_text()[-3000:]
        try: return urllib.request.urlopen(f'{url}/api', timeout=60)
        except OSError: time.sleep(0.5)
    pytest.fail(f'JupyterLab did not answer:\n{log.read_text()[-3000:]}')

def without_outputs(notebook: Path) -> str:
    "The notebook with all outputs cleared."
    read = json.loads(notebook.read_text())
    for cell in read['cells']:
        if cell['cell_type'] == 'code': cell['outputs'] = []
    return json.dumps(read)

@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "A running JupyterLab, and its folder with two notebooks."
    folder = tmp_path_factory.mktemp('lab')
    root, log = folder/'root', folder/'lab.log'
    root.mkdir()
    for notebook in (NBS/'00_paper.ipynb', NBS/'experiments/explore.ipynb'):
        (root/notebook.name).write_text(without_outputs(notebook))
    port = free_port()
    flags = [*LAB_FLAGS, f'--port={port}', f'--ServerApp.root_dir={root}']
    command = [sys.executable, '-m', 'jupyterlab', *flags]
    env = os.environ | home(folder) | dict(PYTHONPATH=str(ROOT))
    with log.open('w') as out: process = subprocess.Popen(command, env=env, stdout=out, stderr=out)
    try:
        wait_for(url := f'http://127.0.0.1:{port}', process, log)
        yield url, root
    finally:
        process.terminate()
        process.wait(PATIENCE)

@contextmanager
def running(url: str, notebook: str):
    "A page of the browser in which this notebook runs; at the end, it must show no error and no warning."
    from playwright.sync_api import expect, sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        page = browser.new_page(viewport=dict(width=1400, height=1100))
        page.set_default_timeout(1000*PATIENCE)
        page.goto(f'{url}/lab/tree/{notebook}.ipynb?reset', wait_until='domcontentloaded')
        page.get_by_text('Python 3 (ipykernel) | Idle').wait_for()  # before that, Run All asks for a kernel
        page.get_by_role('menuitem', name='Run', exact=True).click()
        page.get_by_text('Run All Cells', exact=True).click()
        yield page
        for wrong in ('stderr', 'error'):
            expect(page.locator(f'[data-mime-type="application/vnd.jupyter.{wrong}"]')).to_have_count(0)
        browser.close()

def until(true, what: str, seconds: float = PATIENCE):
    "Wait for something that the browser does not announce."
    end = time.time() + seconds
    while not true():
        assert time.time() < end, f'{what}: not within {seconds} s'
        time.sleep(.05)

def shown(page) -> str:
    "The bytes of the explorer's picture, as the browser has them."
    return page.evaluate("""async () => {
        const image = await fetch(document.querySelector('img.widget-image').src)
        const bytes = await image.arrayBuffer()
        return btoa(Array.from(new Uint8Array(bytes), b => String.fromCharCode(b)).join(''))
    }""")

def answer(page, slider: str, key: str) -> float:
    "Milliseconds from a key on a slider to the frame in which the browser has the new picture."
    return page.evaluate("""([name, key, limit]) => new Promise((done, fail) => {
        const img = document.querySelector('img.widget-image'), old = img.src
        const box = [...document.querySelectorAll('.widget-hslider')].find(b => b.textContent.includes(name))
        const start = performance.now()
        const look = () => requestAnimationFrame(() => {
            const waited = performance.now() - start
            if (waited > limit) fail(`${name}: no new picture`)
            else if (img.src !== old && img.complete) done(waited)
            else look()
        })
        box.querySelector('[role=slider]').dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}))
        look()
    })""", [slider, key, 1000*PATIENCE])

def test_lab_runs_a_notebook(request):
    needs_system(CHROMIUM, 'no Chromium: apt-get install chromium')
    url, _ = request.getfixturevalue('lab')
    from playwright.sync_api import expect
    with running(url, '00_paper') as page:
        share = page.locator('.jp-OutputArea-output').get_by_text('36.0')     # of steps below ψ = 1, in %
        expect(share).to_be_visible(timeout=1000*PATIENCE)

def test_explorer_follows_its_controls(request):
    "Each slider, moved by its keys, changes the picture; so does each choice, and playing the clip."
    needs_system(CHROMIUM, 'no Chromium: apt-get install chromium')
    url, root = request.getfixturevalue('lab')
    with running(url, 'explore') as page:
        page.locator('img.widget-image').wait_for()
        until((root/'runs/explore/metrics.json').exists, 'the notebook has run')
        page.locator('img.widget-image').scroll_into_view_if_needed()
        seen = [shown(page)]
        def changes(what):
            until(lambda: shown(page) not in seen, f'{what}: another picture')
            seen.append(shown(page))
        for slider in ('frame t', 'gate ψ', 'noise σ'):
            page.locator('.widget-hslider').filter(has_text=slider).get_by_role('slider').press('ArrowRight')
            changes(slider)
        for slider in ('frame t', 'gate ψ'):
            waits = [answer(page, slider, ('ArrowLeft', 'ArrowRight')[i % 2]) for i in range(10)]
            print(f'{slider}: {median(waits):.0f} ms to the new picture, at most {max(waits):.0f}')
        choices = dict(clip=dict(index=1), strategy=dict(label='average_ss'), F=dict(label='DIS'))
        for name, choice in choices.items():
            named = page.locator('.widget-dropdown').filter(has=page.get_by_text(name, exact=True))
            named.locator('select').select_option(**choice)
            changes(name)
        page.locator('.widget-play button').first.click()
        for _ in range(2): changes('play')
