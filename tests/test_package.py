"What a user installs: every file that the library reads, and every package that it imports."
import ast, re, sys, tomllib, zipfile
from importlib.metadata import packages_distributions
from pathlib import Path
from conftest import PATIENCE
from notebooks import ROOT, copy_project, python

PROJECT = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']
DISTRIBUTIONS = packages_distributions()
MODULES = sorted(p for p in (ROOT/'flowloss_nb').rglob('*.py') if p.stem != '_modidx')

def names(requirements: list[str]) -> set[str]:
    return {re.match(r'[\w-]+', r)[0].lower().replace('_', '-') for r in requirements}

def foreign(nodes) -> set[str]:
    "The distributions whose packages these nodes import, Python's own and ours left out."
    imports = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
    imports += [n.module for n in nodes if isinstance(n, ast.ImportFrom) and not n.level]
    packages = {i.split('.')[0] for i in imports} - set(sys.stdlib_module_names) - {'flowloss_nb'}
    return {d.lower().replace('_', '-') for p in packages for d in DISTRIBUTIONS.get(p, [p])[:1]}     # what is not installed is called as it is imported

def test_wheel_holds_everything(tmp_path):
    "The wheel carries the embedded clips and the weights beside the modules."
    folder = copy_project(tmp_path)
    python('-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', folder/'wheel', '.', folder=folder, seconds=PATIENCE)
    inside = set(zipfile.ZipFile(*(folder/'wheel').glob('*.whl')).namelist())
    ours = {p.relative_to(ROOT).as_posix() for p in (ROOT/'flowloss_nb').rglob('*') if p.is_file() and '__pycache__' not in p.parts}
    assert ours <= inside, sorted(ours - inside)

def test_imports_are_declared():
    "What a module imports at its top is a dependency; what a function imports may belong to an extra."
    always = names(PROJECT['dependencies'])
    extras = names([r for extra in PROJECT['optional-dependencies'].values() for r in extra])
    for path in MODULES:
        tree = ast.parse(path.read_text())
        assert foreign(tree.body) <= always, f'{path.name}: {sorted(foreign(tree.body) - always)} not among the dependencies'
        assert foreign(list(ast.walk(tree))) <= always | extras, f'{path.name}: {sorted(foreign(list(ast.walk(tree))) - always - extras)} in no extra'

def test_weights_have_cards():
    "Every file of weights that ships is small and has a model card beside it: data, training, numbers, limits, licence."
    shipped = sorted((ROOT/'flowloss_nb'/'assets'/'weights').glob('*.safetensors'))
    assert shipped, 'no weights in flowloss_nb/assets/weights'
    for path in shipped:
        card = path.with_suffix('.md')
        assert card.exists(), f'{path.name} has no model card {card.name}'
        missing = [word for word in ('Data', 'Training', 'Measured', 'Limits', 'Licence') if f'## {word}' not in card.read_text()]
        assert not missing, f'{card.name} has no section {missing}'
        assert path.stat().st_size <= 8e6, f'{path.name}: {path.stat().st_size/1e6:.1f} MB'
