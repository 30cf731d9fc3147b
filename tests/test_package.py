"What a user installs: names, files, weights, and the packages that the library imports."
import ast, re, subprocess, sys, tomllib, zipfile
from importlib.metadata import packages_distributions
import pytest
import flowloss_nb
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
    found = [d for p in packages for d in DISTRIBUTIONS.get(p, [p])[:1]]    # not installed: its import name
    return {d.lower().replace('_', '-') for d in found}

def test_names_of_the_package():
    "Each is what a module of a chapter defines; any other gets Python's error and a hint."
    for name in flowloss_nb.__all__:
        offered = getattr(flowloss_nb, name)
        assert re.match(r'flowloss_nb\.\w+\.\w+$', offered.__module__)
        assert getattr(sys.modules[offered.__module__], name) is offered
    assert {'__version__', *flowloss_nb.__all__} <= set(dir(flowloss_nb))
    with pytest.raises(AttributeError, match="no attribute 'flow_loss'.*objective"): flowloss_nb.flow_loss
    with pytest.raises(ImportError, match='flow_loss'): exec('from flowloss_nb import flow_loss')

def test_the_package_is_light():
    "Importing it costs nothing, and listing its names imports nothing."
    program = 'import sys, flowloss_nb; dir(flowloss_nb); sys.exit(bool({"torch", "numpy"} & {*sys.modules}))'
    assert subprocess.run([sys.executable, '-c', program], cwd=ROOT).returncode == 0

def test_wheel_holds_everything(tmp_path):
    "The wheel carries the embedded clips and the weights beside the modules."
    folder = copy_project(tmp_path)
    wheel = 'pip wheel -q --no-deps --no-build-isolation -w wheel .'
    python('-m', *wheel.split(), folder=folder, seconds=PATIENCE)
    inside = set(zipfile.ZipFile(*(folder/'wheel').glob('*.whl')).namelist())
    files = [p for p in (ROOT/'flowloss_nb').rglob('*') if p.is_file() and '__pycache__' not in p.parts]
    ours = {p.relative_to(ROOT).as_posix() for p in files}
    assert ours <= inside, sorted(ours - inside)

def test_imports_are_declared():
    "What a module imports at its top is a dependency; what a function imports may belong to an extra."
    always = names(PROJECT['dependencies'])
    extras = names([r for extra in PROJECT['optional-dependencies'].values() for r in extra])
    for path in MODULES:
        tree = ast.parse(path.read_text())
        undeclared, unnamed = foreign(tree.body) - always, foreign(list(ast.walk(tree))) - always - extras
        assert not undeclared, f'{path.name}: {sorted(undeclared)} not among the dependencies'
        assert not unnamed, f'{path.name}: {sorted(unnamed)} in no extra'

def test_weights_have_cards():
    "Every file of weights that ships is small and has a model card: data, training, numbers, limits, terms."
    shipped = sorted((ROOT/'flowloss_nb'/'assets'/'weights').glob('*.safetensors'))
    assert shipped, 'no weights in flowloss_nb/assets/weights'
    for path in shipped:
        card = path.with_suffix('.md')
        assert card.exists(), f'{path.name} has no model card {card.name}'
        words, written = ('Data', 'Training', 'Measured', 'Limits', 'Licence'), card.read_text()
        missing = [word for word in words if f'## {word}' not in written]
        assert not missing, f'{card.name} has no section {missing}'
        assert path.stat().st_size <= 8e6, f'{path.name}: {path.stat().st_size/1e6:.1f} MB'
