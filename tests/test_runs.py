"The runner from outside: another process, the command line, a notebook whose kernel dies."
import json, os, subprocess, sys
from pathlib import Path
import pytest
from conftest import PATIENCE
from flowloss_nb.runs import main, run_notebook

ROOT = Path(__file__).parents[1]

def notebook(path, *sources):
    cells = [{'cell_type': 'code', 'metadata': {'tags': ['parameters']} if i == 0 else {}, 'source': s, 'id': f'c{i}', 'execution_count': None, 'outputs': []}
             for i, s in enumerate(sources)]
    path.write_text(json.dumps({'cells': cells, 'metadata': {}, 'nbformat': 4, 'nbformat_minor': 5}))
    return path

def command(*words):
    env = os.environ | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    return subprocess.run([sys.executable, '-m', 'flowloss_nb.runs', *map(str, words)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE)

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
    heavy = "import sys, flowloss_nb.runs; print([m for m in ('papermill', 'ray', 'mujoco', 'metaworld', 'jupyter_client', 'nbclient') if m in sys.modules])"
    done = subprocess.run([sys.executable, '-c', heavy], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout.strip() == '[]', done.stdout + done.stderr[-2000:]
