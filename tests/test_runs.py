"The runner from outside: another process, the command line, a notebook whose kernel dies."
import ast, json, os, subprocess, sys
from datetime import date
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
    cells = [{'cell_type': 'code', 'metadata': {'tags': ['parameters']} if i == 0 else {}, 'source': s, 'id': f'c{i}', 'execution_count': None, 'outputs': []}
             for i, s in enumerate(sources)]
    path.write_text(json.dumps({'cells': cells, 'metadata': {}, 'nbformat': 4, 'nbformat_minor': 5}))
    return path

def command(*words, cwd=ROOT, **more):
    env = os.environ | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'} | more
    return subprocess.run([sys.executable, '-m', 'flowloss_nb.runs', *map(str, words)], cwd=cwd, env=env, capture_output=True, text=True, timeout=PATIENCE)

def test_command_line(tmp_path):
    write = "import json, pathlib\npathlib.Path(run_dir, 'report.html').write_text('x')\njson.dump({'rate': rate}, open(f'{run_dir}/metrics.json', 'w'))"
    toy = notebook(tmp_path/'toy.ipynb', "rate = 1e-3\nrun_dir = '.'", write)
    done = command(toy, tmp_path/'run', '-p', 'rate=None')
    assert done.returncode == 0 and done.stdout.strip().endswith(str(tmp_path/'run/report.html')), done.stderr
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
    heavy = "import sys, flowloss_nb.runs.runs; print([m for m in ('papermill', 'ray', 'mujoco', 'metaworld', 'jupyter_client', 'nbclient') if m in sys.modules])"
    done = subprocess.run([sys.executable, '-c', heavy], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout.strip() == '[]', done.stdout + done.stderr[-2000:]

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
given = dict(steps=steps, lr=lr, psi=psi, size=size, ids=ids, clips=clips, mixed_precision=mixed_precision, fsdp=fsdp, source=source, out=out, config=config, gate=gate)
write_json(new_run(run_dir, given)/'metrics.json', {k: repr(v) for k, v in given.items()})"""

def strict(path):
    "JSON, and no NaN or Infinity in it."
    return json.loads(Path(path).read_text(), parse_constant=lambda c: pytest.fail(f'{path} holds {c}'))

def test_values_arrive_as_what_they_are(tmp_path):
    "Another folder than the notebook's, a file and words: the kernel sees typed values, absolute paths, and what is kept is JSON."
    (tmp_path/'caller'/'a {b}').mkdir(parents=True)
    notebook(tmp_path/'toy.ipynb', TYPED, RESULT)
    (tmp_path/'caller'/'p.yaml').write_bytes('\ufeffsteps: 57e3\r\nmixed_precision: no\r\nsize: [64, 0128]\r\nids: (7, 1_00, 9e-1)\r\nclips: null\r\nfsdp: on\r\nconfig: {visible_start: 9e-1}\r\nsource: data/flat\r\n'.encode())
    words = ('../toy.ipynb', 'a {b}/run', '-f', 'p.yaml', '-p', 'psi=inf', '-p', 'out=~/clips', '-p', 'gate=1e-3', '-p', 'lr=1')
    done = command(*words, cwd=tmp_path/'caller', HOME=str(tmp_path/'home'))
    assert done.returncode == 0, done.stderr
    run, here = tmp_path/'caller'/'a {b}'/'run', tmp_path/'caller'
    found = dict(steps='57000', lr='1.0', psi='inf', size='(64, 128)', ids='[7.0, 100.0, 0.9]', clips='None', mixed_precision="'no'", fsdp='True', source=repr(f'{here}/data/flat'), out=repr(f'{tmp_path}/home/clips'), config="{'visible_start': 0.9}", gate='0.001')
    assert strict(run/'metrics.json') == found
    assert strict(run/'params.json')['experiment'] | {'psi': 'inf', 'size': [64, 128], 'source': f'{here}/data/flat'} == strict(run/'params.json')['experiment']
    assert 'injected-parameters' in str(strict(run/'notebook.ipynb'))

WRONG = dict(steps='2.5', lr='fast', psi='0', size='(64, 9.5)', ids='[7, a]', clips='all', mixed_precision='False', fsdp='maybe', source='', config='3')

@pytest.mark.parametrize('name', WRONG)
def test_a_wrong_value_is_one_line_before_anything_runs(tmp_path, capsys, name):
    toy = notebook(tmp_path/'toy.ipynb', TYPED.replace("source:'Path|None'", "source:'Path'").replace("Path' = None", "Path' = 'x'"), RESULT)
    assert main([str(toy), str(tmp_path/'run'), '-p', f'{name}={WRONG[name]}']) == 1
    told = capsys.readouterr().err
    assert told.startswith(f'error: {name} must be ') and told.count('\n') == 1 and f'got {WRONG[name]}'.strip() in told, told
    assert not (tmp_path/'run').exists()

def test_what_json_cannot_say_is_refused_by_name(tmp_path):
    toy = notebook(tmp_path/'toy.ipynb', TYPED, RESULT)
    for value in ({1, 2}, 1j, b'x', date(2026, 1, 1), object(), {1: 2}, {'a': {1: 2}}, [{3}], float('nan')):
        for name in ('gate', 'config', 'steps'):
            with pytest.raises(ValueError, match=f'^{name} must be '): run_notebook(toy, tmp_path/'run', {name: value})
            with pytest.raises(ValueError, match=f'^{name} must be '): sweep(dict(notebook=str(toy), grid={name: [value]}), tmp_path/'s')
    for text in ('gate: !!set {a, b}', 'gate: !!binary aGk=', 'steps: 2026-01-01', 'steps: 1:30'):
        (tmp_path/'p.yaml').write_text(text)
        with pytest.raises(ValueError, match=r'^(gate|steps) must be '): fit_params(toy, read_params(tmp_path/'p.yaml'))
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []

EXPERIMENTS = experiments()

@pytest.mark.parametrize('book', EXPERIMENTS, ids=lambda p: p.stem)
def test_defaults_fit(book):
    "Every default is of its own type, also as text; a default None says what else there may be."
    typed = {k: v for k, v in typed_parameters(book).items() if k != 'run_dir'}
    meant = {k: ast.literal_eval(default) for k, (_, default) in typed.items()}
    for given in (meant, {k: str(v) for k, v in meant.items()}):
        found = fit_params(book, given)
        assert found == meant and all(type(found[k]) is type(meant[k]) for k in meant)
    untyped = [line for line in ast.parse(tagged_cell(book)).body if isinstance(line, ast.Assign)]
    assert [ast.unparse(line.targets[0]) for line in untyped] == ['run_dir']

def test_parameter_files_fit():
    "Every file of parameters has values of the right type."
    for file in sorted((ROOT/'nbs'/'experiments'/'params').glob('*.yaml')):
        told = read_params(file)
        named = [b for b in EXPERIMENTS if file.stem.startswith(b.stem)] or [find_notebook('experiments/train/train_bridge')]
        assert expand(told) if 'notebook' in told else fit_params(max(named, key=lambda b: len(b.stem)), told)

BAD = [('train', 'objective', 'flo'), ('train', 'K', '14'), ('train', 'K', '0'), ('train', 'psi', '0'), ('train', 'estimator', 'raft'), ('train', 'target', 'exakt'), ('train', 'test_clips', '0'), ('train', 'lr', 'inf'), ('compare', 'ratios', '[0]'),
       ('compare', 'objective', 'recon'), ('compare', 'seeds', '[]'), ('strategy', 'strategy', 'w'), ('strategy', 'clips', '301'), ('strategy', 'seed', '-1'), ('train_bridge', 'mixed_precision', 'False'), ('train_bridge', 'what', 'some'), ('train_bridge', 'ids', '[7, 200]'),
       ('prepare_bridge', 'size', '256'), ('prepare_bridge', 'resampler', 'nearest'), ('explore', 'clips', 'train'), ('plan_scale', 'size', '[64, 96, 3]'), ('train_estimator', 'phases', '[[match, 1]]'), ('train_estimator', 'config', '{edges: maybe}')]

@pytest.mark.parametrize('book,name,value', BAD)
def test_experiments_refuse_before_they_load(book, name, value):
    with pytest.raises(ValueError, match=f'^{name} must be '): fit_params(find_notebook(f'experiments/{book}'), {name: value})

def test_values_in_pairs_have_types():
    "`edges: no` was the text 'no', which switched edges on."
    told = fit_params(find_notebook('experiments/train/train_estimator'), {'config': '{edges: no, visible_start: 9e-1, updates: 2e0, widths: [24, 32], context_widths: null}'})
    assert told == {'config': dict(edges=False, visible_start=.9, updates=2, widths=(24, 32), context_widths=None)}

PATHS = dict(train_bridge=('data', 'svd', 'text', 'weights', 'known', 'metric_weights'), prepare_bridge=('source', 'out'), train=('warm_start', 'weights'), compare=('warm_start', 'weights'), strategy=('weights',), explore=('folder', 'weights'),
             report=('folder',), fig3_noise=('folder', 'weights'), plan_scale=('small_svd',), train_estimator=('extra', 'init'), compare_estimators=('weights',), bench_step=('warm_start',))

def test_paths_mean_the_callers_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path/'home'))
    for book, names in PATHS.items():
        for name in names:
            for given, meant in (('data/flat', f'{tmp_path}/data/flat'), ('~/x', f'{tmp_path}/home/x'), ('/a/b', '/a/b'), ('None', None)):
                assert fit_params(find_notebook(f'experiments/{book}'), {name: given}, tmp_path) == {name: meant}
    assert fit_params(find_notebook('experiments/train/train'), {'warm_start': 'shipped'}, tmp_path) == {'warm_start': 'shipped'}

def test_train_bridge_opens_a_gate():
    "The smoke run is one of flow supervision: a noise level below ψ, and one above."
    told = {k: ast.literal_eval(default) for k, (_, default) in typed_parameters(find_notebook('experiments/train/train_bridge')).items()}
    p = TrainParams(**{k: told[k] for k in ('seed', 'batch_size', 'P_mean', 'P_std')})
    levels = [float(s) for step in range(1, told['steps'] + 1) for s in draw_sigma(p, step, range(p.batch_size))]
    assert told['objective'] == 'flow' and min(levels) < told['psi'] <= max(levels), levels
