"Every notebook runs from top to bottom; what is in git is what the notebooks say."
import ast, ctypes.util, json, re
from itertools import pairwise
import pytest
from conftest import PATIENCE, needs_system
from notebooks import (NBS, ROOT, cells, code, copy_project, experiments, exported, imported, library,
                       module, name, notebooks, python, source)

LIBRARY, EXPERIMENTS = library(), experiments()
RENDERS = '8_simulator/'  # the notebooks of this chapter draw with MuJoCo
HEAVY = {'papermill', 'ray', 'mujoco', 'metaworld', 'gymnasium', 'IPython', 'ipykernel', 'jupyter_client',
         'jupyterlab', 'ipywidgets', 'nbdev', 'nbformat', 'tensorflow', 'tensorflow_datasets'}

def renders() -> bool:
    return all(ctypes.util.find_library(lib) for lib in ('EGL', 'OpenGL'))

@pytest.fixture(scope='session')
def project(tmp_path_factory):
    return copy_project(tmp_path_factory.mktemp('project'))

@pytest.mark.parametrize('notebook', [n for n in notebooks() if n not in EXPERIMENTS], ids=name)
def test_notebook(notebook, project):
    "Restart and run all."
    if name(notebook).startswith(RENDERS):
        needs_system(renders(), 'no EGL: apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri libopengl0')
    python('tests/notebooks.py', name(notebook), folder=project, seconds=PATIENCE)

@pytest.mark.parametrize('notebook', EXPERIMENTS, ids=name)
def test_experiment(notebook, tmp_path):
    "An experiment's defaults are a smoke run that leaves a metrics.json (in a copy where no other writes)."
    folder = copy_project(tmp_path)
    python('tests/notebooks.py', name(notebook), folder=folder, seconds=PATIENCE)
    found = list((folder/'nbs/experiments').rglob('metrics.json'))
    assert found, f'{name(notebook)} wrote no metrics.json'
    drawn = {d for f in found if (d := json.loads(f.read_text()).get('drawn'))}
    assert drawn <= {'what is recorded'}, 'its figures are of the smoke run: record it again (params/)'
    if 'write_report' in code(notebook):
        assert list(folder.rglob('report.html')), f'{name(notebook)} wrote no report.html'

@pytest.mark.parametrize('notebook', EXPERIMENTS, ids=name)
def test_experiment_parameters(notebook):
    "One cell has papermill's tag; every line in it sets one parameter to a literal, with a comment."
    tagged = [source(c) for c in cells(notebook) if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1, f'{len(tagged)} cells are tagged `parameters`'
    for node in ast.parse(tagged[0]).body:
        line = tagged[0].splitlines()[node.lineno - 1]
        assert isinstance(node, ast.Assign | ast.AnnAssign), f'not a parameter: {line}'
        ast.literal_eval(node.value)
        assert re.search(r'#\s*\w+', line), f'no comment: {line}'

def test_export_is_fresh(tmp_path):
    "flowloss_nb/**/*.py is what nbdev_export writes from nbs/, and leaves of the package's own __init__.py."
    folder = copy_project(tmp_path)
    program = 'from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()'
    def modules(): return {p.relative_to(folder): p.read_text() for p in (folder/'flowloss_nb').rglob('*.py')}
    before = modules()
    python('-c', program, folder=folder, seconds=PATIENCE)
    after = modules()
    stale = sorted(f.as_posix() for f in before | after if before.get(f) != after.get(f))
    assert not stale, f'make export would change {stale}'

@pytest.mark.parametrize('notebook', notebooks(), ids=name)
def test_notebook_is_clean(notebook):
    "nbdev_clean would change nothing, and no cell holds an error."
    from execnb.nbio import nb2str, read_nb
    from nbdev.clean import clean_nb
    from nbdev.config import get_config
    cfg, nb = get_config(path=ROOT), read_nb(notebook)
    allowed = (cfg.get(f'allowed_{what}_keys').split() for what in ('metadata', 'cell_metadata'))
    clean_nb(nb, False, *allowed, cfg.clean_ids)
    assert nb2str(nb) == notebook.read_text(), 'run make export'
    assert not any(o['output_type'] == 'error' for c in cells(notebook) for o in c.get('outputs', []))
    figures = [c for c in cells(notebook) if re.search(r'^#\| *label: fig-', source(c), re.M)]
    bare = [source(c).splitlines()[0] for c in figures if not has_picture(c)]
    assert not bare, f'figures without a picture: {bare}'

def has_picture(cell: dict) -> bool:
    return any(kind.startswith('image/') for output in cell['outputs'] for kind in output.get('data', {}))

def joined(text: str) -> set[int]:
    "The lines of a piece of Python on which a statement follows another one."
    nodes, names = ast.walk(ast.parse(text)), ('body', 'orelse', 'finalbody')
    parts = [getattr(node, part, None) for node in nodes for part in names]
    pairs = [pair for statements in parts if isinstance(statements, list) for pair in pairwise(statements)]
    return {second.lineno for first, second in pairs if first.end_lineno == second.lineno}

@pytest.mark.parametrize('notebook', LIBRARY, ids=name)
def test_exported_cells_are_typeset(notebook, width=100):
    "No long line, and one statement a line, in what a notebook exports; `if x: return y` is one."
    text = exported(notebook)
    wrong = {n: f'{len(line)} columns' for n, line in enumerate(text.split('\n'), 1) if len(line) > width}
    wrong |= {n: 'a second statement' for n in joined(text)}
    found = [f'{why}: {text.splitlines()[n - 1].strip()}' for n, why in sorted(wrong.items())]
    assert not found, '\n'.join([name(notebook), *found])

def test_joined_statements_are_found():
    assert joined('a = 1; b = 2\nif a: b = 3\nelse: b = 4; a = 5\ndef f(): return a\nx = "a; b"') == {1, 3}
    assert joined('for i in a: b(); c()\nlambda: 0\ntry: a\nexcept E: b; c\n') == {1, 4}

def test_settings_keep_tags():
    "Without this setting nbdev_clean strips papermill's tag, and every run would silently use the defaults."
    from nbdev.config import get_config
    assert 'tags' in get_config(path=ROOT).get('allowed_cell_metadata_keys').split()

@pytest.mark.parametrize('notebook', LIBRARY, ids=name)
def test_imports_point_down(notebook):
    "Exported code imports only what was exported before it: its chapter's lower numbers, and lower chapters."
    lower = {module(n) for n in LIBRARY[:LIBRARY.index(notebook)]}
    upward = sorted(imported(exported(notebook)) - lower)
    assert not upward, f'{name(notebook)} imports {upward}; below it are {sorted(filter(None, lower))}'

def test_every_module_has_a_notebook():
    "Nobody writes Python in flowloss_nb/ by hand, but for the package's own __init__.py."
    package = ROOT/'flowloss_nb'
    files = [p.relative_to(package) for p in package.rglob('*.py') if p.stem not in ('__init__', '_modidx')]
    modules = {file.with_suffix('').as_posix().replace('/', '.') for file in files}
    assert modules == set(filter(None, map(module, notebooks())))
    assert not any(p.read_text() for p in package.glob('*/__init__.py'))

def test_import_is_light(project):
    "The library imports neither what runs notebooks nor what simulates or schedules."
    modules = [m for m in map(module, notebooks()) if m]
    python('-c', f'''
import importlib, sys
for m in {modules}:
    importlib.import_module(f"flowloss_nb.{{m}}")
    heavy = {HEAVY} & sys.modules.keys()
    assert not heavy, f"flowloss_nb.{{m}} imports {{sorted(heavy)}}"
''', folder=project, seconds=PATIENCE)

TABLES = dict(objective='OBJECTIVES', strategy='OBJECTIVES', estimator='ESTIMATORS')

@pytest.mark.parametrize('notebook', EXPERIMENTS, ids=name)
def test_experiments_offer_what_the_tables_hold(notebook):
    "A new objective or estimator can be chosen in every experiment that chooses one by name."
    from flowloss_nb.runs import stage
    from flowloss_nb.runs.runs import typed_parameters
    typed = typed_parameters(notebook)
    for parameter in TABLES.keys() & typed.keys():
        words = set(re.findall(r"'([^'|]+)'", typed[parameter][0]))
        known = set(getattr(stage, TABLES[parameter]))
        if not words & known: continue      # explore: an estimator to look through
        missing = known - words - {'recon'}     # compare: the base of every comparison
        assert not missing, f'{name(notebook)}: add {sorted(missing)} to the type of `{parameter}`'

PARAMETERS = sorted(p for p in (NBS/'experiments').rglob('*.yaml'))

@pytest.mark.parametrize('file', PARAMETERS, ids=lambda p: p.stem)
def test_parameter_file(file):
    "A file of parameters fits its notebook: the one it names (a sweep) or is named after, or train_bridge."
    import yaml
    from flowloss_nb.runs.runs import known_parameters
    from flowloss_nb.runs.sweeps import expand
    values = yaml.safe_load(file.read_text()) or {}
    if 'notebook' in values: return expand(values)
    named = [n for n in EXPERIMENTS if file.stem.startswith(n.stem)]
    book = max(named, key=lambda n: len(n.stem), default=NBS/'experiments/train/train_bridge.ipynb')
    unknown = set(values) - set(known_parameters(book))
    assert not unknown, f'{name(book)} has no parameter {sorted(unknown)}'
