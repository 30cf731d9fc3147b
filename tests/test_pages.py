"What people read is current and complete: README.md and the site."
import re, tomllib
from notebooks import ROOT, copy_project, notebooks, python
from pages import readme

EXPERIMENTS = [n for n in notebooks() if n.parent.name == 'experiments']

def test_readme_is_current(tmp_path):
    "README.md and its pictures are what `make export` makes of index.ipynb."
    folder = copy_project(tmp_path)
    assert readme(folder) == (ROOT/'README.md').read_text(), 'run make export'
    for picture in (folder/'nbs/images').glob('*.png'):
        assert picture.read_bytes() == (ROOT/'nbs/images'/picture.name).read_bytes(), f'{picture.name}: run make export'

def test_readme_links():
    "Every relative link of the README leads to a file."
    links = re.findall(r'\]\((?![a-z]+:|#)([^)#\s]+)', (ROOT/'README.md').read_text())
    missing = [l for l in links if not (ROOT/l).exists()]
    assert links and not missing, missing

def test_site(tmp_path):
    "Every page builds, and nothing on it dangles."
    folder = copy_project(tmp_path)
    python('tests/pages.py', 'site', folder=folder, seconds=600)
    assert (folder/'_docs/index.html').exists()
    mute = [n.stem for n in EXPERIMENTS if not 'Question.' in (folder/f'_docs/experiments/{n.stem}.html').read_text()]
    assert EXPERIMENTS and not mute, f'what stands below the title is lost from {mute}'
