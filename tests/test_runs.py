"The runner from outside: another process, the command line, a notebook whose kernel dies."
import ast, json, os, subprocess, sys
from datetime import date
from itertools import product
from pathlib import Path
import pytest
from conftest import PATIENCE
from notebooks import experiments
from flowloss_nb.training.step import draw_sigma, TrainParams
from flowloss_nb.runs.__main__ import main
from flowloss_nb.runs.runs import (
    find_notebook, fit_params, read_params, run_notebook, tagged_cell, typed_parameters)
from flowloss_nb.runs.sweeps import expand, sweep

ROOT = Path(__file__).parents[1]

def notebook(path, *sources):
    "A notebook of code cells, the first of which has the parameters."
    cell = dict(cell_type='code', execution_count=None, metadata={}, outputs=[])
    cells = [cell | dict(id=f'c{i}', source=source) for i, source in enumerate(sources)]
    cells[0]['metadata'] = dict(tags=['parameters'])
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    return path

def run(*words, **more):
    "Run Python with these words; its output is caught."
    words = [sys.executable, *map(str, words)]
    return subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, **more)

def command(*words, cwd=ROOT, **more):
    env = os.environ | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'} | more
    return run('-m', 'flowloss_nb.runs', *words, cwd=cwd, env=env)

WRITE = """import json, pathlib
pathlib.Path(run_dir, 'report.html').write_text('x')
json.dump({'rate': rate}, open(f'{run_dir}/metrics.json', 'w'))"""

def test_command_line(tmp_path):
    toy = notebook(tmp_path/'toy.ipynb', "rate = 1e-3\nrun_dir = '.'", WRITE)
    done = command(toy, tmp_path/'run', '-p', 'rate=None')
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(str(tmp_path/'run/report.html'))
    assert json.loads((tmp_path/'run/metrics.json').read_text()) == {'rate': None}

def test_refusal_is_one_line(tmp_path, capsys):
    toy = notebook(tmp_path/'toy.ipynb', 'rate = 1e-3', '')
    assert main([str(toy), str(tmp_path/'other'), '-p', 'rates=1']) == 1
    assert capsys.readouterr().err == 'error: toy.ipynb has no parameter rates; it has rate = 0.001\n'
    assert not (tmp_path/'other').exists()

def test_killed_kernel_is_an_error(tmp_path):
    dies = notebook(tmp_path/'dies.ipynb', 'a = 1', 'import os; os.kill(os.getpid(), 9)')
    with pytest.raises(RuntimeError, match='dies.ipynb'): run_notebook(dies, tmp_path/'run')

def test_importing_stays_light():
    heavy = {'papermill', 'ray', 'mujoco', 'metaworld', 'jupyter_client', 'nbclient'}
    done = run('-c', f'import sys, flowloss_nb.runs.runs; print({heavy} & sys.modules.keys())', cwd=ROOT)
    assert done.stdout.strip() == 'set()', done.stdout + done.stderr[-2000:]

FILE = """\ufeffsteps: 57e3
mixed_precision: no
size: [64, 0128]
ids: (7, 1_00, 9e-1)
clips: null
fsdp: on
config: {visible_start: 9e-1}
source: data/flat
"""

TYPED = """run_dir = 'x'
steps = 4
lr = 1e-3
psi:'float > 0' = 1.0
size = (64, 96)
ids = [7, 200, 0.1]
clips:int|None = 8
mixed_precision:"'no'|'bf16'" = 'no'
fsdp = False
source:'Path|None' = None
out:"None|'shipped'|Path" = None
config = {}
gate = None"""
RESULT = """import json
from flowloss_nb.training.checkpoints import write_json
from flowloss_nb.runs.runs import new_run
given = dict(steps=steps, lr=lr, psi=psi, size=size, ids=ids, clips=clips, mixed_precision=mixed_precision,
             fsdp=fsdp, source=source, out=out, config=config, gate=gate)
write_json(new_run(run_dir, given)/'metrics.json', {k: repr(v) for k, v in given.items()})"""

def strict(path):
    "What a JSON file holds; NaN or Infinity are refused."
    return json.loads(Path(path).read_text(), parse_constant=lambda c: pytest.fail(f'{path} holds {c}'))

def test_values_have_their_types(tmp_path):
    "From a file and from words, in another folder: the kernel gets typed values and absolute paths."
    here = tmp_path/'caller'
    folder = here/'a {b}'/'run'
    folder.parent.mkdir(parents=True)
    notebook(tmp_path/'toy.ipynb', TYPED, RESULT)
    (here/'p.yaml').write_bytes(FILE.replace('\n', '\r\n').encode())
    words = ['../toy.ipynb', 'a {b}/run', '-f', 'p.yaml']
    for word in ('psi=inf', 'out=~/clips', 'gate=1e-3', 'lr=1'): words += ['-p', word]
    done = command(*words, cwd=here, HOME=str(tmp_path/'home'))
    assert done.returncode == 0, done.stderr
    assert strict(folder/'metrics.json') == dict(
        steps='57000', lr='1.0', psi='inf', size='(64, 128)', ids='[7.0, 100.0, 0.9]', clips='None',
        mixed_precision="'no'", fsdp='True', source=repr(f'{here}/data/flat'),
        out=repr(f'{tmp_path}/home/clips'), config="{'visible_start': 0.9}", gate='0.001')
    stored = strict(folder/'params.json')['experiment']
    assert stored | dict(psi='inf', size=[64, 128], source=f'{here}/data/flat') == stored
    assert 'injected-parameters' in str(strict(folder/'notebook.ipynb'))

WRONG = dict(steps='2.5', lr='fast', psi='0', size='(64, 9.5)', ids='[7, a]', clips='all',
             mixed_precision='False', fsdp='maybe', source='', config='3')

@pytest.mark.parametrize('name', WRONG)
def test_a_wrong_value_is_one_line_before_anything_runs(tmp_path, capsys, name):
    needed = TYPED.replace("source:'Path|None'", "source:'Path'").replace("Path' = None", "Path' = 'x'")
    toy = notebook(tmp_path/'toy.ipynb', needed, RESULT)
    assert main([str(toy), str(tmp_path/'run'), '-p', f'{name}={WRONG[name]}']) == 1
    message = capsys.readouterr().err
    assert message.startswith(f'error: {name} must be ')
    assert message.count('\n') == 1
    assert f'got {WRONG[name]}'.strip() in message
    assert not (tmp_path/'run').exists()

def test_what_json_cannot_hold_is_refused_by_name(tmp_path):
    toy = notebook(tmp_path/'toy.ipynb', TYPED, RESULT)
    values = ({1, 2}, 1j, b'x', date(2026, 1, 1), object(), {1: 2}, {'a': {1: 2}}, [{3}], float('nan'))
    for value, name in product(values, ('gate', 'config', 'steps')):
        plan, message = dict(notebook=str(toy), grid={name: [value]}), f'^{name} must be '
        with pytest.raises(ValueError, match=message): run_notebook(toy, tmp_path/'run', {name: value})
        with pytest.raises(ValueError, match=message): sweep(plan, tmp_path/'s')
    for text in ('gate: !!set {a, b}', 'gate: !!binary aGk=', 'steps: 2026-01-01', 'steps: 1:30'):
        (tmp_path/'p.yaml').write_text(text)
        values = read_params(tmp_path/'p.yaml')
        with pytest.raises(ValueError, match=r'^(gate|steps) must be '): fit_params(toy, values)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []

EXPERIMENTS = experiments()

@pytest.mark.parametrize('book', EXPERIMENTS, ids=lambda p: p.stem)
def test_defaults_fit(book):
    "Every default is of its own type, also as text; every parameter but `run_dir` states its type."
    typed = {k: v for k, v in typed_parameters(book).items() if k != 'run_dir'}
    defaults = {k: ast.literal_eval(default) for k, (_, default) in typed.items()}
    for given in (defaults, {k: str(v) for k, v in defaults.items()}):
        fitted = fit_params(book, given)
        assert fitted == defaults
        assert all(type(fitted[k]) is type(defaults[k]) for k in defaults)
    untyped = [line for line in ast.parse(tagged_cell(book)).body if isinstance(line, ast.Assign)]
    assert [ast.unparse(line.targets[0]) for line in untyped] == ['run_dir']

def test_parameter_files_fit():
    "Every file of parameters has values of the right type."
    other = find_notebook('experiments/train/train_bridge')
    for file in sorted((ROOT/'nbs'/'experiments'/'params').glob('*.yaml')):
        values = read_params(file)
        named = [book for book in EXPERIMENTS if file.stem.startswith(book.stem)]
        book = max(named, key=lambda book: len(book.stem), default=other)
        assert expand(values) if 'notebook' in values else fit_params(book, values)

BAD = dict(
    train=[('objective', 'flo'), ('K', '14'), ('K', '0'), ('psi', '0'), ('estimator', 'raft'),
           ('target', 'exakt'), ('test_clips', '0'), ('lr', 'inf')],
    compare=[('ratios', '[0]'), ('objective', 'recon'), ('seeds', '[]')],
    strategy=[('strategy', 'w'), ('clips', '301'), ('seed', '-1')],
    train_bridge=[('mixed_precision', 'False'), ('what', 'some'), ('ids', '[7, 200]')],
    prepare_bridge=[('size', '256'), ('resampler', 'nearest')],
    explore=[('clips', 'train')],
    plan_scale=[('size', '[64, 96, 3]')],
    train_estimator=[('phases', '[[match, 1]]'), ('config', '{edges: maybe}')])

@pytest.mark.parametrize('book,name,value', [(book, *pair) for book, pairs in BAD.items() for pair in pairs])
def test_experiments_refuse_before_they_load(book, name, value):
    with pytest.raises(ValueError, match=f'^{name} must be '):
        fit_params(find_notebook(f'experiments/{book}'), {name: value})

def test_values_in_pairs_have_types():
    "`edges: no` was the text 'no', which switched edges on."
    text = '{edges: no, visible_start: 9e-1, updates: 2e0, widths: [24, 32], context_widths: null}'
    fitted = fit_params(find_notebook('experiments/train/train_estimator'), {'config': text})
    config = dict(edges=False, visible_start=.9, updates=2, widths=(24, 32), context_widths=None)
    assert fitted == {'config': config}

PATHS = dict(
    train_bridge=('data', 'svd', 'text', 'weights', 'known', 'metric_weights'),
    prepare_bridge=('source', 'out'), train=('warm_start', 'weights'), compare=('warm_start', 'weights'),
    strategy=('weights',),
    explore=('folder', 'weights'), report=('folder',), fig3_noise=('folder', 'weights'),
    where_motion=('folder', 'weights'),
    plan_scale=('small_svd',), train_estimator=('extra', 'init'), compare_estimators=('weights',),
    train_distance=('extra',),
    bench_step=('warm_start',))

def test_paths_mean_the_callers_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path/'home'))
    meant = {'data/flat': f'{tmp_path}/data/flat', '~/x': f'{tmp_path}/home/x', '/a/b': '/a/b', 'None': None}
    for book, names in PATHS.items():
        experiment = find_notebook(f'experiments/{book}')
        for name, (given, path) in product(names, meant.items()):
            assert fit_params(experiment, {name: given}, tmp_path) == {name: path}
    shipped = {'warm_start': 'shipped'}
    assert fit_params(find_notebook('experiments/train/train'), shipped, tmp_path) == shipped

def test_train_bridge_opens_a_gate():
    "The smoke run is one of flow supervision: a noise level below ψ, and one above."
    typed = typed_parameters(find_notebook('experiments/train/train_bridge'))
    values = {k: ast.literal_eval(default) for k, (_, default) in typed.items()}
    p = TrainParams(**{k: values[k] for k in ('seed', 'batch_size', 'P_mean', 'P_std')})
    steps = range(1, values['steps'] + 1)
    levels = [float(sigma) for step in steps for sigma in draw_sigma(p, step, range(p.batch_size))]
    assert values['objective'] == 'flow'
    assert min(levels) < values['psi'] <= max(levels), levels
