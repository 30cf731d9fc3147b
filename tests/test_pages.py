"What people read is current and complete: README.md and the site."
import json, re
from conftest import CHROMIUM, CHROMIUM_FLAGS, PATIENCE, needs_system
from notebooks import NBS, ROOT, copy_project, experiments, name, notebooks, python
from pages import Problems, check_links, contents, cross_reference, readme

EXPERIMENTS = experiments()

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

def too_wide(site, widths=(390, 1280)) -> list[str]:
    "Pages that scroll sideways in a browser of these widths, or show a picture that isn't there."
    from playwright.sync_api import sync_playwright
    found = []
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        for width in widths:
            page = browser.new_page(viewport=dict(width=width, height=900))
            for file in sorted(site.rglob('*.html')):
                page.goto(file.as_uri())
                wide, broken = page.evaluate("[document.documentElement.scrollWidth, [...document.images].filter(i => i.complete && !i.naturalWidth).length]")
                if wide > width or broken: found.append(f'{file.relative_to(site)} at {width}: {wide} wide, {broken} broken pictures')
        browser.close()
    return found

def test_site(tmp_path):
    "Every page builds, nothing on it dangles, and none scrolls sideways on a telephone."
    folder = copy_project(tmp_path)
    python('tests/pages.py', 'site', folder=folder, seconds=PATIENCE)
    assert (folder/'_docs/index.html').exists()
    mute = [n.stem for n in EXPERIMENTS if not 'Question.' in (folder/f'_docs/{name(n)}.html').read_text()]
    assert 'href="../source/training/losses.py"' in (folder/'_docs/5_training/losses.html').read_text()
    assert (folder/'_docs/source/training/losses.py').exists()
    assert EXPERIMENTS and not mute, f'what stands below the title is lost from {mute}'
    needs_system(CHROMIUM, 'the pages were built, and not looked at: no Chromium: apt-get install chromium')
    assert not (wrong := too_wide(folder/'_docs')), '\n'.join(wrong)
    (tmp_path/'wrong').mkdir(); (tmp_path/'wrong'/'a.html').write_text('<div style="width: 500px">wide</div><img src="gone.png">')
    assert [w.split(': ')[1] for w in too_wide(tmp_path/'wrong')] == ['508 wide, 1 broken pictures', '1280 wide, 1 broken pictures']

def test_what_is_wrong_is_found(tmp_path):
    "Each kind of fault that the site's build looks for is found where there is one, and nowhere else."
    (tmp_path/'a.html').write_text('<h1 id="top">A</h1><a href="b.html#here">b</a> <a href="#top">up</a>')
    (tmp_path/'b.html').write_text('<p id="here">B</p>')
    check_links(tmp_path, right := Problems())
    (tmp_path/'c.html').write_text('<a href="gone.html">x</a> <a href="a.html#nowhere">y</a> see @fig-none <img src="https://example.org/p.png"> <a href="https://git.invalid/z">z</a>')
    check_links(tmp_path, wrong := Problems())
    assert not right and len(wrong) == 5
    for words in ('dangling link gone.html', 'no anchor a.html#nowhere', 'unresolved @fig-none', 'img from the network', 'does not exist'): assert any(words in w for w in wrong), words
    page = tmp_path/'a.ipynb'
    page.write_text(json.dumps(dict(cells=[dict(cell_type='markdown', source='@fig-there and @fig-gone'), dict(cell_type='code', source='#| label: fig-there\n#| fig-cap: "There."\n1')])))
    (tmp_path/'b.ipynb').write_text(page.read_text())
    cross_reference(page, tmp_path, refers := Problems())
    assert refers == ['a.ipynb: @fig-gone refers to nothing on this page'] and '[Figure 1](#fig-there)' in page.read_text()

def listed(items):
    for item in items: yield from [item] if isinstance(item, str) else listed(item['contents'])

def test_sidebar_lists_every_page():
    "And in the order in which the notebooks run."
    assert list(listed(contents(NBS)))[:20] == [f'{name(n)}.ipynb' for n in notebooks()][:20]
    assert sorted(listed(contents(NBS))) == sorted(f'{name(n)}.ipynb' for n in notebooks())
