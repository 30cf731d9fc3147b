"""README.md from nbs/index.ipynb, and the pages of the site: `python tests/pages.py readme|process|site`, in the project's root.

`process` writes the notebooks as the site shows them into `_proc/`, for Quarto. `site` makes the whole site without Quarto:
the same notebooks rendered by smalldocs, which reads `_quarto.yml` too. What Quarto does and smalldocs does not is done here:
page names without numbers, numbered cross-references, and maths that needs no network. Whatever a reader would stumble over is
collected in `Problems` and listed at the end: a link or an anchor that leads nowhere, a reference to no figure or equation, a
page that the sidebar lacks, a formula that does not render.
"""
import ast, base64, html, json, os, re, shutil, sys
from html.parser import HTMLParser
from pathlib import Path
import yaml

KINDS = dict(fig='Figure', tbl='Table', eq='Equation', sec='Section')
LABEL = r'(?:fig|tbl|eq|sec)-[\w-]+'

class Problems(list):
    "What is wrong with the pages; printed at the end, all of it at once."
    def stop(self):
        if self: sys.exit('\n'.join([*self, f'{len(self)} problem(s)']))

def text(part) -> str:
    "nbformat keeps text as a string or as a list of lines."
    return ''.join(part)

def options(source: str) -> tuple[dict, str]:
    "The `#|` options of a code cell, and its code. nbdev's directives have no colon and become keys too."
    lines = source.splitlines(True)
    n = next((i for i, line in enumerate(lines) if not line.startswith('#|')), len(lines))
    words = [line[2:].strip() for line in lines[:n]]
    keys = yaml.safe_load('\n'.join(w for w in words if ':' in w)) or {}
    return keys | {w.split()[0]: True for w in words if ':' not in w}, ''.join(lines[n:])

# README

def readme(root: Path) -> str:
    "README.md: index.ipynb's prose, code and outputs, its links rewritten to lead from the root into nbs/."
    parts = []
    for cell in json.loads((root/'nbs/index.ipynb').read_text())['cells']:
        if cell['cell_type'] == 'markdown': parts.append(_from_root(text(cell['source'])))
        if cell['cell_type'] == 'code': parts += _readme_code(cell, root)
    return '<!-- written by `make export` from nbs/index.ipynb: edit that -->\n\n' + '\n\n'.join(p.strip() for p in parts if p.strip()) + '\n'

def _from_root(markdown: str) -> str:
    "Links relative to nbs/ become links relative to the root; references to the page's own figures become words."
    markdown = re.sub(r'@(fig|tbl)-[\w-]+', lambda m: dict(fig='the figure', tbl='the table')[m[1]], markdown)
    return re.sub(r'(\]\()(?![a-z]+:|#|/)([^)\s]+)', lambda m: m[1] + os.path.normpath(f'nbs/{m[2]}'), markdown)

def _readme_code(cell: dict, root: Path) -> list[str]:
    "A code cell: its code unless hidden, then what it printed or drew; pictures are written beside the notebooks."
    keys, code = options(text(cell['source']))
    if 'hide' in keys or keys.get('include') is False: return []
    parts = [] if keys.get('echo') is False else [f'```python\n{code.strip()}\n```']
    for out in cell['outputs']:
        data = out.get('data', {})
        if 'image/png' in data: parts.append(_readme_picture(keys, base64.b64decode(text(data['image/png'])), root))
        elif 'text/markdown' in data: parts.append(_from_root(text(data['text/markdown'])))
        elif 'text/plain' in data: parts.append(f"```\n{text(data['text/plain'])}\n```")
        elif out['output_type'] == 'stream': parts.append(f"```\n{text(out['text']).rstrip()}\n```")
    return parts

def _readme_picture(keys: dict, png: bytes, root: Path) -> str:
    if 'label' not in keys: sys.exit('index.ipynb: a picture in the README needs `#| label: fig-...` and `#| fig-cap: ...`')
    file = Path(f"nbs/images/{keys['label']}.png")
    (root/file).parent.mkdir(exist_ok=True)
    if not (root/file).exists() or (root/file).read_bytes() != png: (root/file).write_bytes(png)
    caption = keys.get('fig-cap', '')
    return f'![{caption}]({file})\n\n*{caption}*'

# The site

def site(root: Path):
    "Build `_docs/`, and end with a list of what is wrong, if anything is."
    from nbdev.config import get_config
    from smalldocs.site import build
    cfg, problems, source = get_config(), Problems(), root/'_site_src'
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(process(cfg), source)
    for page in sorted(source.rglob('*.ipynb')): cross_reference(page, source, problems)
    rename(source, problems)
    built = build(source, quiet=True)
    problems += [w for w in built.warnings if 'broken link' not in w]  # check_links sees these too, and anchors
    shutil.copytree(source/'source', built.out/'source', dirs_exist_ok=True)
    for page in sorted(built.out.rglob('*.html')): offline(page, built.out, cfg, problems)
    check_links(built.out, problems)
    shutil.rmtree(cfg.doc_path, ignore_errors=True)
    shutil.move(built.out, cfg.doc_path)
    shutil.rmtree(source)
    print(f'{cfg.doc_path/"index.html"} is the first of {len(built.pages)} pages')
    problems.stop()

def process(cfg) -> Path:
    "Write into `_proc/` the notebooks as the site shows them, for Quarto or for us."
    import nbdev.doclinks, nbdev.serve
    from nbdev.processors import FilterDefaults
    from nbdev.quarto import refresh_quarto_yml
    class WithSource(FilterDefaults):
        "nbdev's steps, less those that put a signature in a function's place: its few lines are what one came to read."
        def base_procs(self):
            signature = {'add_show_docs', 'exec_show_docs', 'rm_export', 'add_fold', 'mv_exports'}
            return [keep_intro, link_source] + [step for step in super().base_procs() if step.__name__ not in signature] + [show_source]
    refresh_quarto_yml()
    (cfg.nbs_path/'sidebar.yml').write_text(yaml.safe_dump(dict(website=dict(sidebar=dict(contents=contents(cfg.nbs_path)))), sort_keys=False))
    nbdev.doclinks._build_modidx()
    nbdev.serve.FilterDefaults = WithSource  # nbdev's setting for this, `procs`, wants an installed module
    out = nbdev.serve.proc_nbs(cfg.nbs_path, n_workers=0, force=True)
    (out/'source').mkdir(exist_ok=True)
    for module in cfg.lib_path.rglob('*.py'):
        copy = out/'source'/module.relative_to(cfg.lib_path)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(module, copy)
    return out

def contents(nbs: Path) -> list:
    "The sidebar: the first pages, then a section for each folder, in the order of the file listing."
    pages = lambda folder: [p.relative_to(nbs).as_posix() for p in sorted(folder.glob('*.ipynb'))]
    title = lambda f: f'{f.name[0]} · {f.name[2:].capitalize()}' if f.name[0].isdigit() else f'Experiments: {f.name}'
    folders = [*sorted(nbs.glob('[0-9]_*')), *(nbs/'experiments'/name for name in ('paper', 'train', 'cost'))]
    sections = [dict(section=title(f), contents=found) for f in folders if (found := pages(f))]
    return ['index.ipynb', *(p for p in pages(nbs) if p != 'index.ipynb'), *sections, *pages(nbs/'experiments')]

class keep_intro:
    "A step for nbdev, which takes the title's cell for front matter and drops what else it says: that becomes a cell of its own."
    def __init__(self, nb): self.nb = nb
    def begin(self):
        from execnb.nbio import mk_cell
        first = next((i for i, cell in enumerate(self.nb.cells) if cell.cell_type == 'markdown'), None)
        if first is None: return
        head = re.match(r'# .*\n*(?:>.*\n?)*', text(self.nb.cells[first].source))
        if head and (rest := text(self.nb.cells[first].source)[head.end():].strip()):
            self.nb.cells[first].source = head[0]
            self.nb.cells.insert(first + 1, mk_cell(rest, 'markdown'))

class link_source:
    "A step for nbdev: below its title, a page that is exported says to which file, and links to it."
    def __init__(self, nb): self.nb = nb
    def begin(self):
        from execnb.nbio import mk_cell
        module = next((d['default_exp'][0] for cell in self.nb.cells if 'default_exp' in (d := getattr(cell, 'directives_', {}))), None)
        if not module: return
        file = module.replace('.', '/') + '.py'
        up = '../' * module.count('.')      # a notebook stands as deep as its module
        self.nb.cells.insert(1, mk_cell(f'[Source: flowloss_nb/{file}]({up}source/{file})', 'markdown'))

class show_source:
    "A step for nbdev: hidden cells go, exported ones stay, under the anchors that links to their definitions lead to."
    def __init__(self, nb): self.nb = nb
    def begin(self): self.nb.cells = [shown for cell in self.nb.cells for shown in self.shown(cell)]
    def shown(self, cell) -> list:
        from execnb.nbio import mk_cell
        directives = getattr(cell, 'directives_', {}).keys()
        if directives & {'hide', 'default_exp'}: return []
        anchors = ''.join(f'<a id="{d}"></a>' for d in defined(cell.source)) if directives & {'export', 'exports', 'exporti'} else ''
        return [mk_cell(anchors, 'markdown'), cell] if anchors else [cell]

def defined(code: str) -> list[str]:
    "The functions, classes and methods that a cell defines, as nbdev writes them in links."
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    top = [node for node in ast.parse(code).body if isinstance(node, kinds)]
    methods = [f'{c.name}.{f.name}' for c in top if isinstance(c, ast.ClassDef) for f in c.body if isinstance(f, kinds)]
    return [name.lower() for name in [node.name for node in top] + methods]

def unnumbered(file: str) -> str:
    "nbdev's name of a page: 04_edm.ipynb becomes edm."
    return re.sub(r'^\d+_', '', file)

def cross_reference(page: Path, source: Path, problems: Problems):
    "Number what has a label, put the numbers into captions and equations, and turn `@fig-x` into a link."
    nb, where = json.loads(page.read_text()), page.relative_to(source)
    numbers = _numbers(nb, where, problems)
    for cell in nb['cells']:
        if cell['cell_type'] == 'code': cell['source'] = _caption(text(cell['source']), numbers)
        if cell['cell_type'] == 'markdown': cell['source'] = _refer(text(cell['source']), numbers, where, problems)
    page.write_text(json.dumps(nb))

def _numbers(nb: dict, where: Path, problems: Problems) -> dict[str, str]:
    "Label → what a reader calls it: {'fig-gate': 'Figure 1'}."
    labels = []
    for cell in nb['cells']:
        source = text(cell['source'])
        if cell['cell_type'] == 'markdown': labels += re.findall(rf'\{{#({LABEL})\}}', source)
        if cell['cell_type'] == 'code':
            try: keys, _ = options(source)
            except yaml.YAMLError as e: problems.append(f'{where}: a cell option is not YAML: {e}'); continue
            labels += re.findall(rf'^{LABEL}$', str(keys.get('label', '')))
    problems += [f'{where}: two things are labelled {l}' for l in {l for l in labels if labels.count(l) > 1}]
    of_kind = lambda kind: [l for l in labels if l.startswith(f'{kind}-')]
    return {l: f'{word} {i}' for kind, word in KINDS.items() for i, l in enumerate(of_kind(kind), 1)}

def _caption(source: str, numbers: dict[str, str]) -> str:
    "A figure's or table's caption begins with its number."
    keys, _ = options(source)
    if keys.get('label') not in numbers: return source
    def numbered(m): return f"#| {m[1]}: {json.dumps(numbers[keys['label']] + ': ' + keys[m[1]], ensure_ascii=False)}"
    return re.sub(r'^#\| *((?:fig|tbl)-cap):.*$', numbered, source, flags=re.M)

def _refer(markdown: str, numbers: dict[str, str], where: Path, problems: Problems) -> str:
    "Equations and tables get their numbers and anchors, references become links; code is left alone."
    def equation(m): return f'::: {{#{m[2]}}}\n$${m[1].strip()} \\tag{{{numbers[m[2]].split()[1]}}}$$\n:::\n'
    def table(m): return f': {numbers[m[2]]}: {m[1]} {{#{m[2]}}}'
    def reference(m):
        if m[1] is None: return m[0]
        if m[1] not in numbers: problems.append(f'{where}: @{m[1]} refers to nothing on this page'); return m[0]
        return f'[{numbers[m[1]]}](#{m[1]})'
    markdown = re.sub(r'\$\$(.*?)\$\$ *\{#(eq-[\w-]+)\}', equation, markdown, flags=re.S)
    markdown = re.sub(r'^: (.*?) *\{#(tbl-[\w-]+)\}', table, markdown, flags=re.M)
    return re.sub(rf'```.*?```|`[^`\n]*`|(?<!\w)@({LABEL})', reference, markdown, flags=re.S)

def rename(source: Path, problems: Problems):
    "Give every page the name that Quarto reads in `output-file`, in links and in the sidebar too; Quarto's other options go."
    config, side = source/'_quarto.yml', source/'sidebar.yml'
    config.write_text(config.read_text().replace('html-math-method: mathml', ''))
    side.write_text(re.sub(r'(?<=[ /])\d+_(\w+\.ipynb)', r'\1', side.read_text()))
    for page in sorted(source.rglob('*.ipynb')):
        nb = json.loads(page.read_text())
        front = nb['cells'][0]
        if 'output-file' not in text(front['source']): problems.append(f'{page.relative_to(source)}: no title (a cell with `# Title`)')
        front['source'] = re.sub(r'^output-file:.*\n', '', text(front['source']), flags=re.M)
        for cell in nb['cells']:
            if cell['cell_type'] != 'code':
                cell['source'] = re.sub(r'(\]\((?:[\w.-]+/)*)\d+_(\w+\.ipynb)', r'\1\2', text(cell['source']))
        page.unlink()
        page.with_name(unnumbered(page.name)).write_text(json.dumps(nb))

def mathml(tex: str, display: bool) -> str:
    "TeX as MathML, which browsers draw by themselves; three spellings that the converter does not know are replaced."
    from latex2mathml.converter import convert
    tex = re.sub(r'\\\\\[[^\]]*\]', r'\\\\', tex).replace('{aligned}', '{align*}')
    tex = re.sub(r'\\tag\{([^}]*)\}', r'\\qquad\\text{(\1)}', tex)
    bar = '<mo{}>&#x02016;</mo>'  # the ‖ of a norm, which browsers would stretch
    return convert(tex, display='block' if display else 'inline').replace(bar.format(''), bar.format(' stretchy="false"'))

def offline(page: Path, out: Path, cfg, problems: Problems):
    "Maths without a network, nbdev's absolute links to this site made relative, and no `source` links to a host that is not there."
    where, t = page.relative_to(out), page.read_text()
    def formula(m):
        tex = html.unescape(m[2])
        try: return mathml(tex, m[1] == 'display')
        except Exception as e: problems.append(f'{where}: {tex!r} does not render: {e!r}'); return m[0]
    t = re.sub(r'<span class="math (inline|display)">\\[\(\[](.*?)\\[\)\]]</span>', formula, t, flags=re.S)
    t = re.sub(r'<(?:script|link)[^>]*katex[^>]*>(?:</script>)?', '', t)
    if '.invalid' in cfg.git_url: t = re.sub(rf'<a [^>]*href="{re.escape(cfg.git_url)}[^>]*>source</a>', '', t)
    t = t.replace(f'href="{cfg.doc_host}{cfg.doc_baseurl}/', 'href="' + '../' * (len(where.parts) - 1))
    page.write_text(t)

class Links(HTMLParser):
    "The anchors of a page, and everything it points at."
    def __init__(self, page: Path):
        super().__init__()
        self.ids, self.targets, self.words, self.skip = set(), set(), '', 0
        self.feed(page.read_text())
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[k] for k in ('id', 'name') if attrs.get(k)}
        self.targets |= {(tag, attrs[k]) for k in ('href', 'src') if attrs.get(k)}
        self.skip += tag in ('code', 'script', 'style')
    def handle_endtag(self, tag): self.skip -= tag in ('code', 'script', 'style')
    def handle_data(self, data): self.words += '' if self.skip else data

def check_links(out: Path, problems: Problems):
    "Every link of every page leads to a file and an anchor that exist; what draws the page comes from the site itself."
    from urllib.parse import unquote, urlsplit
    pages = {p.resolve(): Links(p) for p in out.rglob('*.html')}
    for page, links in pages.items():
        where = page.relative_to(out.resolve())
        problems += [f'{where}: unresolved {r}' for r in sorted(set(re.findall(rf'\?@[\w-]+|(?<!\w)@{LABEL}', links.words)))]
        for tag, target in sorted(links.targets):
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                if tag in ('script', 'img') and parts.scheme != 'data': problems.append(f'{where}: {tag} from the network: {target}')
                if (parts.hostname or '').endswith('.invalid'): problems.append(f'{where}: link to a host that does not exist: {target}')
                continue
            file = (page.parent/unquote(parts.path)).resolve() if parts.path else page
            if file.is_dir(): file = file/'index.html'
            if not file.exists(): problems.append(f'{where}: dangling link {target}')
            elif parts.fragment and file in pages and unquote(parts.fragment) not in pages[file].ids:
                problems.append(f'{where}: no anchor {target}')

if __name__ == '__main__':
    what, root = sys.argv[1], Path.cwd()
    sys.path.insert(0, str(root))
    if what == 'readme': (root/'README.md').write_text(readme(root))
    elif what == 'process':
        from nbdev.config import get_config
        process(get_config())
    elif what == 'site': site(root)
    else: sys.exit(__doc__)
