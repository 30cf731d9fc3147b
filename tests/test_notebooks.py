"Every notebook runs from top to bottom; what is in git is what the notebooks say."
import ast, ctypes.util, json, re
import pytest
from conftest import PATIENCE, needs_system
from notebooks import (NBS, ROOT, cells, code, copy_project, experiments, exported, imported, library,
                       module, name, notebooks, python, source)

LIBRARY, EXPERIMENTS = library(), experiments()
RENDERS = '8_simulator/'  # what stands in this chapter draws with MuJoCo

def renders() -> bool:
    return all(ctypes.util.find_library(lib) for lib in ('EGL', 'OpenGL'))

@pytest.fixture(scope='session')
def project(tmp_path_factory):
    return copy_project(tmp_path_factory.mktemp('project'))

@pytest.mark.parametrize('notebook', [n for n in notebooks() if n not in EXPERIMENTS], ids=name)
def test_notebook(notebook, project):
    "Restart and run all."
    if name(notebook).startswith(RENDERS): needs_system(renders(), 'no EGL: apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri libopengl0')
    python('tests/notebooks.py', name(notebook), folder=project, seconds=PATIENCE)

@pytest.mark.parametrize('notebook', EXPERIMENTS, ids=name)
def test_experiment(notebook, tmp_path):
    "An experiment's defaults are a smoke run that leaves a metrics.json (in a copy of its own, so that no other run's is found)."
    folder = copy_project(tmp_path)
    python('tests/notebooks.py', name(notebook), folder=folder, seconds=PATIENCE)
    found = list((folder/'nbs/experiments').rglob('metrics.json'))
    assert found, f'{name(notebook)} wrote no metrics.json'
    drawn = {d for f in found if (d := json.loads(f.read_text()).get('drawn'))}
    assert drawn <= {'what is recorded'}, 'its figures are of the smoke run: record it anew (params/)'
    if 'write_report' in code(notebook): assert list(folder.rglob('report.html')), f'{name(notebook)} wrote no report.html'

@pytest.mark.parametrize('notebook', EXPERIMENTS, ids=name)
def test_experiment_parameters(notebook):
    "One cell has papermill's tag; every line in it sets one parameter to a literal and says what it is."
    tagged = [source(c) for c in cells(notebook) if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1, f'{len(tagged)} cells are tagged `parameters`'
    for node in ast.parse(tagged[0]).body:
        line = tagged[0].splitlines()[node.lineno - 1]
        assert isinstance(node, ast.Assign | ast.AnnAssign), f'not a parameter: {line}'
        ast.literal_eval(node.value)
        assert re.search(r'#\s*\w+', line), f'no comment: {line}'

def test_export_is_fresh(tmp_path):
    "flowloss_nb/*.py is what nbdev_export writes from nbs/."
    folder = copy_project(tmp_path)
    modules = lambda: {p.relative_to(folder).as_posix(): p.read_text() for p in (folder/'flowloss_nb').rglob('*.py')}
    before = modules()
    python('-c', 'from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()', folder=folder, seconds=PATIENCE)
    after = modules()
    stale = sorted(f for f in before | after if before.get(f) != after.get(f))
    assert not stale, f'make export would change {stale}'

@pytest.mark.parametrize('notebook', notebooks(), ids=name)
def test_notebook_is_clean(notebook):
    "nbdev_clean would change nothing, and no cell holds an error."
    from execnb.nbio import nb2str, read_nb
    from nbdev.clean import clean_nb
    from nbdev.config import get_config
    cfg, nb = get_config(path=ROOT), read_nb(notebook)
    clean_nb(nb, False, cfg.get('allowed_metadata_keys').split(), cfg.get('allowed_cell_metadata_keys').split(), cfg.clean_ids)
    assert nb2str(nb) == notebook.read_text(), 'run make export'
    assert not any(o['output_type'] == 'error' for c in cells(notebook) for o in c.get('outputs', []))
    bare = [source(c).splitlines()[0] for c in cells(notebook) if source(c).startswith('#| label: fig-') and not any(k.startswith('image/') for o in c['outputs'] for k in o.get('data', {}))]
    assert not bare, f'figures without a picture: {bare}'

def test_settings_keep_tags():
    "Without this setting nbdev_clean strips papermill's tag, and every run would silently use the defaults."
    from nbdev.config import get_config
    assert 'tags' in get_config(path=ROOT).get('allowed_cell_metadata_keys').split()

@pytest.mark.parametrize('notebook', LIBRARY, ids=name)
def test_imports_point_down(notebook):
    "What a notebook exports imports only what was exported before it: its chapter's lower numbers, and lower chapters."
    lower = {module(n) for n in LIBRARY[:LIBRARY.index(notebook)]}
    upward = imported(exported(notebook)) - lower
    assert not upward, f'{name(notebook)} imports {sorted(upward)}; below it stand {sorted(filter(None, lower))}'

def test_every_module_has_a_notebook():
    "Nobody writes Python in flowloss_nb/ by hand."
    package = ROOT/'flowloss_nb'
    files = {p.relative_to(package).with_suffix('').as_posix().replace('/', '.') for p in package.rglob('*.py') if p.stem not in ('__init__', '_modidx')}
    assert files == {m for m in map(module, notebooks()) if m}

def test_import_is_light(project):
    "The library imports neither what runs notebooks nor what simulates or schedules."
    heavy = {'papermill', 'ray', 'mujoco', 'metaworld', 'gymnasium', 'IPython', 'ipykernel', 'jupyter_client', 'jupyterlab', 'ipywidgets', 'nbdev', 'nbformat',
             'tensorflow', 'tensorflow_datasets'}
    modules = [m for m in map(module, notebooks()) if m]
    program = '\n'.join(['import importlib, sys', f'for m in {modules}:', '    importlib.import_module(f"flowloss_nb.{m}")',
                         f'    bad = {heavy} & sys.modules.keys()', '    assert not bad, f"flowloss_nb.{m} imports {sorted(bad)}"'])
    python('-c', program, folder=project, seconds=PATIENCE)

PARAMETERS = sorted(p for p in (NBS/'experiments').rglob('*.yaml'))

@pytest.mark.parametrize('file', PARAMETERS, ids=lambda p: p.stem)
def test_parameter_file(file):
    "A file of parameters fits its notebook: the one it names (a sweep), the one it is named after, or train_bridge."
    import yaml
    from flowloss_nb.runs.runs import known_parameters
    from flowloss_nb.runs.sweeps import expand
    told = yaml.safe_load(file.read_text()) or {}
    if 'notebook' in told: assert expand(told); return
    named = [n for n in EXPERIMENTS if file.stem.startswith(n.stem)]
    book = max(named, key=lambda n: len(n.stem)) if named else NBS/'experiments/train/train_bridge.ipynb'
    unknown = set(told) - set(known_parameters(book))
    assert not unknown, f'{name(book)} has no parameter {sorted(unknown)}'
