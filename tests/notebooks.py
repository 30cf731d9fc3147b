"Notebooks as the tests see them: where they are, what they export and import, how one is run by itself."
import ast, json, os, re, shutil, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/'nbs'
PROJECT = ('settings.ini', 'pyproject.toml', 'README.md', 'CHANGELOG.md', 'LICENSE', '_quarto.yml',
           'nbs', 'flowloss_nb', 'tests')

def notebooks() -> list[Path]:
    "Every notebook, in reading order: the first pages, the chapters, the experiments."
    def parts(p): return p.relative_to(NBS).parts
    def ours(p): return 'runs' not in parts(p) and not any(part[0] in '._' for part in parts(p))
    def place(p): return (len(parts(p)) > 1, parts(p)[0] == 'experiments', p.stem != 'index', p)
    return sorted(filter(ours, NBS.rglob('*.ipynb')), key=place)

def experiments() -> list[Path]:
    "The notebooks that are run with parameters."
    return [p for p in notebooks() if p.relative_to(NBS).parts[0] == 'experiments']

def library() -> list[Path]:
    "The notebooks that explain, define and test."
    return [p for p in notebooks() if p not in experiments() and p.stem != 'index']

def name(notebook: Path) -> str:
    "A notebook's name: its path below nbs/, without the suffix."
    return notebook.relative_to(NBS).with_suffix('').as_posix()

def cells(notebook: Path) -> list[dict]:
    return json.loads(notebook.read_text())['cells']

def source(cell: dict) -> str:
    return ''.join(cell['source'])

def code(notebook: Path) -> str:
    "The code of a notebook as one text; magics, which ast cannot read, become `pass`."
    text = '\n'.join(source(c) for c in cells(notebook) if c['cell_type'] == 'code')
    return re.sub(r'^(\s*)[!%].*$', r'\1pass', text, flags=re.M)

def exported(notebook: Path) -> str:
    "The code that a notebook exports, as one text."
    return '\n'.join(source(c) for c in cells(notebook) if re.search(r'^#\| *exporti?\b', source(c), re.M))

def module(notebook: Path) -> str | None:
    "The module a notebook exports, if it exports one."
    found = re.search(r'^#\| *default_exp +(\S+)', code(notebook), re.M)
    return found and found[1]

def imported(text: str) -> set[str]:
    "The modules of flowloss_nb that a piece of Python imports anywhere, as 'chapter.module'."
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import): found |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            base = 'flowloss_nb.' * bool(node.level) + (node.module or '')
            found |= {f'{base}.{a.name}' for a in node.names} if base.strip('.') == 'flowloss_nb' else {base}
    return {'.'.join(m.split('.')[1:3]) for m in found if m.startswith('flowloss_nb.')}

def left_out(folder: str, names: list[str]) -> set[str]:
    "What a copy of the project leaves out: caches, and what runs have written."
    written = {'__pycache__', '.ipynb_checkpoints'} | ({'runs'} if 'experiments' in folder else set())
    return written & set(names)

def copy_project(folder: Path) -> Path:
    "A copy of the project to run and build in, so that the tree stays as it is."
    for item in PROJECT:
        if (ROOT/item).is_dir():
            shutil.copytree(ROOT/item, folder/item, symlinks=True, ignore=left_out)
        elif (ROOT/item).exists(): shutil.copy(ROOT/item, folder/item)
    return folder

def python(*args, folder: Path, seconds: float):
    "Run Python in a copy of the project (not the installed one); fail with the end of what it printed."
    temporary = folder/'tmp'
    temporary.mkdir(exist_ok=True)
    env = os.environ | dict(PYTHONPATH=str(folder), TMPDIR=str(temporary),
                            MPLBACKEND='agg', OMP_NUM_THREADS='1')
    command = [sys.executable, *map(str, args)]
    try: done = subprocess.run(command, cwd=folder, env=env, timeout=seconds, capture_output=True, text=True)
    except subprocess.TimeoutExpired: pytest.fail(f'not done after {seconds} s', pytrace=False)
    printed = (done.stdout + done.stderr)[-6000:]
    if done.returncode: pytest.fail(f'exit {done.returncode}\n{printed}', pytrace=False)

def run(notebook: str):
    "Run a notebook of the project in the current folder as `nbdev_test` does: directives and flags count."
    from nbdev.config import get_config
    from nbdev.test import test_nb
    flags = get_config().tst_flags.split()
    passed, _ = test_nb(Path(f'nbs/{notebook}.ipynb').resolve(), skip_flags=flags, basepath=Path.cwd())
    sys.exit(0 if passed else 1)

if __name__ == '__main__': run(sys.argv[1])
