"README.md and the site are current and complete."
import json, re
import flowloss_nb
from conftest import CHROMIUM, CHROMIUM_FLAGS, PATIENCE, needs_system
from notebooks import NBS, ROOT, copy_project, experiments, name, notebooks, python
from pages import API, Problems, check_links, contents, cross_reference, readme

EXPERIMENTS = experiments()

def test_readme_is_current(tmp_path):
    "README.md and its pictures are what `make export` makes of index.ipynb."
    folder = copy_project(tmp_path)
    assert readme(folder) == (ROOT/'README.md').read_text(), 'run make export'
    for picture in (folder/'nbs/images').glob('fig-*'):
        same = picture.read_bytes() == (ROOT/'nbs/images'/picture.name).read_bytes()
        assert same, f'{picture.name}: run make export'

def test_readme_begins_with_what_matters():
    "A picture, the equation, the finding and the command, in this order, before Python and the chapters."
    text = (ROOT/'README.md').read_text()
    parts = ('![', '\\tag{3}', 'Where the loss acts', 'make run', '```python', '| chapter |')
    places = [text.index(part) for part in parts]
    assert places == sorted(places)

def test_readme_links():
    "Every relative link of the README leads to a file."
    links = re.findall(r'\]\((?![a-z]+:|#)([^)#\s]+)', (ROOT/'README.md').read_text())
    missing = [l for l in links if not (ROOT/l).exists()]
    assert links and not missing, missing

LOOK = """() => [document.documentElement.scrollWidth,
                 [...document.images].filter(image => image.complete && !image.naturalWidth).length]"""

def too_wide(site, widths=(390, 1280)) -> list[str]:
    "Pages that scroll sideways in a browser of these widths, or lack a picture."
    from playwright.sync_api import sync_playwright
    found = []
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        for width in widths:
            page = browser.new_page(viewport=dict(width=width, height=900))
            for file in sorted(site.rglob('*.html')):
                page.goto(file.as_uri())
                wide, broken = page.evaluate(LOOK)
                if wide <= width and not broken: continue
                found.append(f'{file.relative_to(site)} at {width}: {wide} wide, {broken} broken pictures')
        browser.close()
    return found

def test_site(tmp_path):
    "Every page builds, no link dangles, and none scrolls sideways on a telephone."
    folder = copy_project(tmp_path)
    python('tests/pages.py', 'site', folder=folder, seconds=PATIENCE)
    assert (folder/'_docs/index.html').exists()
    mute = [n.stem for n in EXPERIMENTS if not 'Question.' in (folder/f'_docs/{name(n)}.html').read_text()]
    assert 'href="../source/training/losses.py"' in (folder/'_docs/5_training/losses.html').read_text()
    assert (folder/'_docs/source/training/losses.py').exists()
    assert EXPERIMENTS and not mute, f'the text below the title is lost from {mute}'
    listed = (folder/'_docs/api.html').read_text()
    missing = [name for name in flowloss_nb.__all__ if f'.html#{name.lower()}"' not in listed]
    assert not missing, f'the index of the API lacks {missing}'
    needs_system(CHROMIUM, 'the pages were built, but not opened: no Chromium: apt-get install chromium')
    assert not (wrong := too_wide(folder/'_docs')), '\n'.join(wrong)

def test_wide_pages_are_found(tmp_path):
    needs_system(CHROMIUM, 'no Chromium: apt-get install chromium')
    (tmp_path/'a.html').write_text('<div style="width: 500px">wide</div><img src="gone.png">')
    wrong = [w.split(': ')[1] for w in too_wide(tmp_path)]
    assert wrong == ['508 wide, 1 broken pictures', '1280 wide, 1 broken pictures']

def test_faults_are_found(tmp_path):
    "Each kind of fault that the site's build looks for is found where there is one, and nowhere else."
    (tmp_path/'a.html').write_text('<h1 id="top">A</h1><a href="b.html#here">b</a> <a href="#top">up</a>')
    (tmp_path/'b.html').write_text('<p id="here">B</p>')
    check_links(tmp_path, right := Problems())
    faults = {'<a href="gone.html">x</a>': 'dangling link gone.html',
              '<a href="a.html#nowhere">y</a>': 'no anchor a.html#nowhere',
              'see @fig-none': 'unresolved @fig-none',
              'see [x] (a.ipynb#b)': 'a link shown as text: ] (a.ipynb',
              '<img src="https://example.org/p.png">': 'img from the network',
              '<a href="https://git.invalid/z">z</a>': 'does not exist'}
    (tmp_path/'c.html').write_text(' '.join(faults))
    check_links(tmp_path, wrong := Problems())
    assert not right
    assert len(wrong) == len(faults)
    for words in faults.values(): assert any(words in w for w in wrong), words

def test_references_get_numbers(tmp_path):
    "A reference to a figure of the page becomes a link; one to another page's is a fault."
    page = tmp_path/'a.ipynb'
    cells = [dict(cell_type='markdown', source='@fig-there and @fig-gone'),
             dict(cell_type='code', source='#| label: fig-there\n#| fig-cap: "There."\n1')]
    page.write_text(json.dumps(dict(cells=cells)))
    cross_reference(page, tmp_path, wrong := Problems())
    assert wrong == ['a.ipynb: @fig-gone refers to nothing on this page']
    assert '[Figure 1](#fig-there)' in page.read_text()

def flat(items):
    for item in items: yield from [item] if isinstance(item, str) else flat(item['contents'])

def test_sidebar_lists_every_page():
    "In the order in which the notebooks run, and with the one page that has no notebook."
    side = [page for page in flat(contents(NBS)) if page != API]
    pages = [f'{name(n)}.ipynb' for n in notebooks()]
    assert side[:20] == pages[:20]
    assert sorted(side) == sorted(pages)
    assert len(side) == len(list(flat(contents(NBS)))) - 1
