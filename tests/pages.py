"""README.md and the site, made from the notebooks: `python tests/pages.py readme|process|site`.

It runs in the project's root. `readme` writes README.md from nbs/index.ipynb. `process` writes the notebooks
as the site shows them into `_proc/`, for Quarto. `site` makes the whole site without Quarto: smalldocs
renders the same notebooks and reads the same `_quarto.yml`. What Quarto does and smalldocs does not is done
here: page names without numbers, numbered cross-references, and formulas that need no network.

Whatever a reader would stumble over is collected in `Problems` and listed at the end: a link or an anchor
that leads nowhere, a reference to no figure or equation, a page that the sidebar lacks, a formula that does
not render.
"""
import ast, base64, html, json, os, re, shutil, sys
from html.parser import HTMLParser
from pathlib import Path
import yaml

KINDS = dict(fig='Figure', tbl='Table', eq='Equation', sec='Section')
LABEL = r'(?:fig|tbl|eq|sec)-[\w-]+'
PICTURES = {'image/png': 'png', 'image/jpeg': 'jpg'}
SHOWN = {*PICTURES, 'text/markdown', 'text/plain'}
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
API = 'api.ipynb'  # the page that only the site has

class Problems(list):
    "What is wrong with the pages, printed at the end, all at once."
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
    parts = ['<!-- written by `make export` from nbs/index.ipynb: edit that -->', *(p.strip() for p in parts)]
    return '\n\n'.join(filter(None, parts)) + '\n'

def _from_root(markdown: str) -> str:
    """Links relative to nbs/ become relative to the root; what only the site has becomes plain text.

    That is the page of the API, and references to the page's own figures.
    """
    def from_root(m): return m[1] + os.path.normpath(f'nbs/{m[2]}')
    markdown = re.sub(r'@(fig|tbl)-[\w-]+', lambda m: dict(fig='the figure', tbl='the table')[m[1]], markdown)
    markdown = re.sub(rf'\[([^\]]+)\]\({re.escape(API)}\)', r'\1', markdown)
    return re.sub(r'(\]\()(?![a-z]+:|#|/)([^)\s]+)', from_root, markdown)

def _readme_code(cell: dict, root: Path) -> list[str]:
    "A code cell: its code unless hidden, then its outputs; pictures become files beside the notebooks."
    keys, code = options(text(cell['source']))
    if 'hide' in keys or keys.get('include') is False: return []
    parts = [] if keys.get('echo') is False else [f'```python\n{code.strip()}\n```']
    for out in cell['outputs']:
        data = {kind: text(out['data'][kind]) for kind in SHOWN & out.get('data', {}).keys()}
        if kind := next((k for k in PICTURES if k in data), None):
            parts.append(_readme_picture(keys, base64.b64decode(data[kind]), PICTURES[kind], root))
        elif 'text/markdown' in data: parts.append(_from_root(data['text/markdown']))
        elif 'text/plain' in data: parts.append(f"```\n{data['text/plain']}\n```")
        elif out['output_type'] == 'stream': parts.append(f"```\n{text(out['text']).rstrip()}\n```")
    return parts

def _readme_picture(keys: dict, picture: bytes, suffix: str, root: Path) -> str:
    "Write a picture to a file; Markdown that shows it, above its caption."
    if 'label' not in keys: sys.exit('index.ipynb: a picture needs `#| label: fig-...` and `#| fig-cap: ...`')
    file = Path(f"nbs/images/{keys['label']}.{suffix}")
    (root/file).parent.mkdir(exist_ok=True)
    if not (root/file).exists() or (root/file).read_bytes() != picture: (root/file).write_bytes(picture)
    caption = keys.get('fig-cap', '')
    shown = re.sub(r'[$*\[\]]', '', keys.get('fig-alt', caption))
    return f'![{shown}]({file})\n\n*{caption}*'

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
    problems += [w for w in built.warnings if 'broken link' not in w]  # check_links finds these, and anchors
    shutil.copytree(source/'source', built.out/'source', dirs_exist_ok=True)
    for page in sorted(built.out.rglob('*.html')): offline(page, built.out, cfg, problems)
    check_links(built.out, problems)
    shutil.rmtree(cfg.doc_path, ignore_errors=True)
    shutil.move(built.out, cfg.doc_path)
    shutil.rmtree(source)
    print(f'{cfg.doc_path/"index.html"} is the first of {len(built.pages)} pages')
    problems.stop()

def process(cfg) -> Path:
    "Write into `_proc/` the notebooks as the site shows them, for Quarto or for `site`."
    import nbdev.doclinks, nbdev.serve
    from nbdev.quarto import refresh_quarto_yml
    refresh_quarto_yml()
    sidebar = dict(website=dict(sidebar=dict(contents=contents(cfg.nbs_path))))
    (cfg.nbs_path/'sidebar.yml').write_text(yaml.safe_dump(sidebar, sort_keys=False))
    nbdev.doclinks._build_modidx()
    nbdev.serve.FilterDefaults = with_source()  # nbdev's setting for this, `procs`, wants an installed module
    out = nbdev.serve.proc_nbs(cfg.nbs_path, n_workers=0, force=True)
    for module in cfg.lib_path.rglob('*.py'):
        copy = out/'source'/module.relative_to(cfg.lib_path)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(module, copy)
    write_page(out/API, 'API', api(cfg))
    return out

def with_source():
    "nbdev's steps, less those that replace a function by its signature: a reader came for its few lines."
    from nbdev.processors import FilterDefaults
    signature = {'add_show_docs', 'exec_show_docs', 'rm_export', 'add_fold', 'mv_exports'}
    class WithSource(FilterDefaults):
        def base_procs(self):
            steps = [step for step in super().base_procs() if step.__name__ not in signature]
            return [keep_intro, link_source, *steps, show_source]
    return WithSource

def write_page(file: Path, title: str, markdown: str):
    "A page without a notebook: it looks as nbdev leaves one."
    head = f'---\noutput-file: {file.with_suffix(".html").name}\ntitle: {title}\n---\n'
    parts = [('raw', head), ('markdown', markdown)]
    cells = [dict(cell_type=kind, metadata={}, source=source) for kind, source in parts]
    file.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))

def chapters(nbs: Path) -> list[Path]:
    "The folders of notebooks that make the library."
    return sorted(nbs.glob('[0-9]_*'))

def contents(nbs: Path) -> list:
    "The sidebar: the first pages, then a section for each folder, in the order of the file listing."
    def pages(folder): return [p.relative_to(nbs).as_posix() for p in sorted(folder.glob('*.ipynb'))]
    def title(folder):
        number, _, word = folder.name.partition('_')
        return f'{number} · {word.capitalize()}' if word else f'Experiments: {folder.name}'
    folders = [*chapters(nbs), *(nbs/'experiments'/name for name in ('paper', 'train', 'cost'))]
    sections = [dict(section=title(folder), contents=found) for folder in folders if (found := pages(folder))]
    first = [page for page in pages(nbs) if page != 'index.ipynb']
    return ['index.ipynb', *first, API, *sections, *pages(nbs/'experiments')]

# The index of the API

API_HEAD = """All public names, by chapter and in reading order. Each leads to its definition, where every
parameter is explained. **Bold** ones can be imported from the package itself, e.g.
`from flowloss_nb import {}`."""

def api(cfg) -> str:
    "Every public name by chapter and module: where it is defined, how it is called, what it does."
    from flowloss_nb import __all__ as shortcuts
    parts = [API_HEAD.format(', '.join(shortcuts[-3:]))]
    for chapter in chapters(cfg.nbs_path):
        modules = [module_index(notebook, cfg, shortcuts) for notebook in sorted(chapter.glob('*.ipynb'))]
        if any(modules): parts += [f'## {chapter.name[2:].capitalize()}', *filter(None, modules)]
    return '\n\n'.join(parts)

def module_index(notebook: Path, cfg, shortcuts: list[str]) -> str:
    "One module: its heading, its sentence, and a line for each function and class; '' if there are none."
    page = notebook.relative_to(cfg.nbs_path).as_posix()
    module = re.search(r'#\| *default_exp +([\w.]+)', notebook.read_text())
    file = module and cfg.lib_path/(module[1].replace('.', '/') + '.py')
    if not (file and file.exists()): return ''
    source = file.read_text()
    tree = ast.parse(source)
    lines = [api_line(node, source, page, node.name in shortcuts) for node in tree.body if public(node)]
    head = f'### [{module[1]}]({page})\n\n{ast.get_docstring(tree) or ""}\n'
    return '\n'.join([head, *lines]) if lines else ''

def public(node) -> bool:
    "A function or class for users; a method that nbdev patches into a class belongs to that class."
    if not isinstance(node, FUNCTIONS | ast.ClassDef) or node.name.startswith('_'): return False
    return not any(isinstance(d, ast.Name) and d.id.startswith('patch') for d in node.decorator_list)

def api_line(node, source: str, page: str, bold: bool) -> str:
    "A function's or class's name and signature, what it returns, and its first sentence."
    name, words = node.name, (ast.get_docstring(node) or '').split('\n')[0]
    link = f'[`{name}`]({page}#{name.lower()})'
    code = ast.get_source_segment(source, node)
    returns = re.search(r'^\)->[^#\n]*# *(.+)$', code, re.M)     # as docments has it
    arrow = f' → {returns[1]}' if returns else ''
    return f'- {f"**{link}**" if bold else link}`({signature(node)})`{arrow}  \n  {words}'

def signature(node) -> str:
    "The parameters of a function, of a class's __init__ or of a dataclass, with defaults and without types."
    if isinstance(node, ast.ClassDef):
        init = next((f for f in node.body if isinstance(f, FUNCTIONS) and f.name == '__init__'), None)
        if init is None: return ', '.join(map(field, (f for f in node.body if isinstance(f, ast.AnnAssign))))
        node = init
    for arg in ast.walk(node.args):
        if isinstance(arg, ast.arg): arg.annotation = None
    return re.sub(r'^self(, )?', '', ast.unparse(node.args))

def field(node: ast.AnnAssign) -> str:
    "A dataclass's field and its default."
    return ast.unparse(node.target) + (f'={ast.unparse(node.value)}' if node.value else '')

# nbdev's steps

class keep_intro:
    "nbdev makes the title's cell front matter and drops the rest of it: this step keeps that as a cell."
    def __init__(self, nb): self.nb = nb
    def begin(self):
        from execnb.nbio import mk_cell
        cells = self.nb.cells
        first = next((i for i, cell in enumerate(cells) if cell.cell_type == 'markdown'), None)
        if first is None: return
        words = text(cells[first].source)
        head = re.match(r'# .*\n*(?:>.*\n?)*', words)
        if head and (rest := words[head.end():].strip()):
            cells[first].source = head[0]
            cells.insert(first + 1, mk_cell(rest, 'markdown'))

class link_source:
    "Below the title of an exported notebook: a link to the module that it exports."
    def __init__(self, nb): self.nb = nb
    def begin(self):
        from execnb.nbio import mk_cell
        directives = [getattr(cell, 'directives_', {}) for cell in self.nb.cells]
        module = next((d['default_exp'][0] for d in directives if 'default_exp' in d), None)
        if not module: return
        file = module.replace('.', '/') + '.py'
        up = '../' * module.count('.')      # a notebook lies as deep as its module
        self.nb.cells.insert(1, mk_cell(f'[Source: flowloss_nb/{file}]({up}source/{file})', 'markdown'))

class show_source:
    "Hidden cells go; exported ones stay, below the anchors that links to their definitions need."
    def __init__(self, nb): self.nb = nb
    def begin(self): self.nb.cells = [shown for cell in self.nb.cells for shown in self.shown(cell)]
    def shown(self, cell) -> list:
        from execnb.nbio import mk_cell
        directives = getattr(cell, 'directives_', {}).keys()
        if directives & {'hide', 'default_exp'}: return []
        if not directives & {'export', 'exports', 'exporti'}: return [cell]
        anchors = ''.join(f'<a id="{name}"></a>' for name in defined(cell.source))
        return [mk_cell(anchors, 'markdown'), cell] if anchors else [cell]

def defined(code: str) -> list[str]:
    "The functions, classes and methods that a cell defines, as nbdev writes them in links."
    kinds = FUNCTIONS | ast.ClassDef
    top = [node for node in ast.parse(code).body if isinstance(node, kinds)]
    classes = [node for node in top if isinstance(node, ast.ClassDef)]
    methods = [f'{c.name}.{f.name}' for c in classes for f in c.body if isinstance(f, kinds)]
    return [name.lower() for name in [node.name for node in top] + methods]

# Cross-references and names

def unnumbered(file: str) -> str:
    "nbdev's name of a page: 04_edm.ipynb becomes edm."
    return re.sub(r'^\d+_', '', file)

def cross_reference(page: Path, source: Path, problems: Problems):
    "Number what has a label, put the numbers into captions and equations, and turn `@fig-x` into a link."
    nb, where = json.loads(page.read_text()), page.relative_to(source)
    numbers = _numbers(nb, where, problems)
    for cell in nb['cells']:
        source = text(cell['source'])
        if cell['cell_type'] == 'code': cell['source'] = _caption(source, numbers)
        if cell['cell_type'] == 'markdown': cell['source'] = _refer(source, numbers, where, problems)
    page.write_text(json.dumps(nb))

def _numbers(nb: dict, where: Path, problems: Problems) -> dict[str, str]:
    "Label → what a reader calls it: {'fig-gate': 'Figure 1'}."
    labels = []
    for cell in nb['cells']:
        source = text(cell['source'])
        if cell['cell_type'] == 'markdown': labels += re.findall(rf'\{{#({LABEL})\}}', source)
        if cell['cell_type'] == 'code':
            try: label = options(source)[0].get('label', '')
            except yaml.YAMLError as e: problems.append(f'{where}: a cell option is not YAML: {e}')
            else: labels += re.findall(rf'^{LABEL}$', str(label))
    problems += [f'{where}: two things are labelled {l}' for l in {l for l in labels if labels.count(l) > 1}]
    def of_kind(kind): return [label for label in labels if label.startswith(f'{kind}-')]
    return {label: f'{word} {i}' for kind, word in KINDS.items() for i, label in enumerate(of_kind(kind), 1)}

def _caption(source: str, numbers: dict[str, str]) -> str:
    "A figure's or table's caption begins with its number."
    keys, _ = options(source)
    if keys.get('label') not in numbers: return source
    def numbered(m):
        caption = f"{numbers[keys['label']]}: {keys[m[1]]}"
        return f'#| {m[1]}: {json.dumps(caption, ensure_ascii=False)}'
    return re.sub(r'^#\| *((?:fig|tbl)-cap):.*$', numbered, source, flags=re.M)

def _refer(markdown: str, numbers: dict[str, str], where: Path, problems: Problems) -> str:
    "Equations and tables get their numbers and anchors, references become links; code is left alone."
    def equation(m): return f'::: {{#{m[2]}}}\n$${m[1].strip()} \\tag{{{numbers[m[2]].split()[1]}}}$$\n:::\n'
    def table(m): return f': {numbers[m[2]]}: {m[1]} {{#{m[2]}}}'
    def reference(m):
        if m[1] is None: return m[0]
        if m[1] in numbers: return f'[{numbers[m[1]]}](#{m[1]})'
        problems.append(f'{where}: @{m[1]} refers to nothing on this page')
        return m[0]
    markdown = re.sub(r'\$\$(.*?)\$\$ *\{#(eq-[\w-]+)\}', equation, markdown, flags=re.S)
    markdown = re.sub(r'^: (.*?) *\{#(tbl-[\w-]+)\}', table, markdown, flags=re.M)
    return re.sub(rf'```.*?```|`[^`\n]*`|(?<!\w)@({LABEL})', reference, markdown, flags=re.S)

def rename(source: Path, problems: Problems):
    "Give every page the name in its `output-file`, in links and in the sidebar too; drop Quarto's options."
    config, side = source/'_quarto.yml', source/'sidebar.yml'
    config.write_text(config.read_text().replace('html-math-method: mathml', ''))
    side.write_text(re.sub(r'(?<=[ /])\d+_(\w+\.ipynb)', r'\1', side.read_text()))
    for page in sorted(source.rglob('*.ipynb')):
        nb = json.loads(page.read_text())
        front, where = nb['cells'][0], page.relative_to(source)
        head = text(front['source'])
        if 'output-file' not in head: problems.append(f'{where}: no title (a cell with `# Title`)')
        front['source'] = re.sub(r'^output-file:.*\n', '', head, flags=re.M)
        for cell in nb['cells']:
            if cell['cell_type'] != 'code': cell['source'] = _unnumber_links(text(cell['source']))
            for data in (output.get('data', {}) for output in cell.get('outputs', [])):
                markdown = text(data.get('text/markdown', ''))
                if markdown: data['text/markdown'] = _unnumber_links(markdown)
        page.unlink()
        page.with_name(unnumbered(page.name)).write_text(json.dumps(nb))

def _unnumber_links(markdown: str) -> str:
    return re.sub(r'(\]\((?:[\w.-]+/)*)\d+_(\w+\.ipynb)', r'\1\2', markdown)

def mathml(tex: str, display: bool) -> str:
    "TeX as MathML, which browsers draw by themselves; spellings unknown to the converter are replaced."
    from latex2mathml.converter import convert
    tex = re.sub(r'\\\\\[[^\]]*\]', r'\\\\', tex).replace('{aligned}', '{align*}')
    tex = re.sub(r'\\tag\{([^}]*)\}', r'\\qquad\\text{(\1)}', tex)
    bar = '<mo{}>&#x02016;</mo>'  # the ‖ of a norm, which browsers would stretch
    drawn = convert(tex, display='block' if display else 'inline')
    return drawn.replace(bar.format(''), bar.format(' stretchy="false"'))

def offline(page: Path, out: Path, cfg, problems: Problems):
    """Formulas become MathML, which needs no network; nbdev's absolute links to this site become relative.

    While settings.ini names no real host of the code, its `source` links go.
    """
    where, t = page.relative_to(out), page.read_text()
    def formula(m):
        tex = html.unescape(m[2])
        try: return mathml(tex, m[1] == 'display')
        except Exception as e: problems.append(f'{where}: {tex!r} does not render: {e!r}'); return m[0]
    t = re.sub(r'<span class="math (inline|display)">\\[\(\[](.*?)\\[\)\]]</span>', formula, t, flags=re.S)
    t = re.sub(r'<(?:script|link)[^>]*katex[^>]*>(?:</script>)?', '', t)
    if '.invalid' in cfg.git_url:
        t = re.sub(rf'<a [^>]*href="{re.escape(cfg.git_url)}[^>]*>source</a>', '', t)
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
    "Every link leads to a file and an anchor that exist; what draws the page comes from the site itself."
    pages = {p.resolve(): Links(p) for p in out.rglob('*.html')}
    for page, links in pages.items():
        unresolved = sorted(set(re.findall(rf'\?@[\w-]+|(?<!\w)@{LABEL}', links.words)))
        found = [f'unresolved {reference}' for reference in unresolved]
        shown = re.findall(r'\]\s*\([\w./-]+\.(?:ipynb|html)', links.words)
        found += [f'a link shown as text: {link}' for link in shown]
        found += [wrong_link(tag, target, page, pages) for tag, target in sorted(links.targets)]
        problems += [f'{page.relative_to(out.resolve())}: {wrong}' for wrong in found if wrong]

def wrong_link(tag: str, target: str, page: Path, pages: dict[Path, Links]) -> str | None:
    "What is wrong with a link, if anything is."
    from urllib.parse import unquote, urlsplit
    parts = urlsplit(target)
    if parts.scheme or parts.netloc:
        if tag in ('script', 'img') and parts.scheme != 'data': return f'{tag} from the network: {target}'
        if (parts.hostname or '').endswith('.invalid'): return f'link to a host that does not exist: {target}'
        return None
    file = (page.parent/unquote(parts.path)).resolve() if parts.path else page
    if file.is_dir(): file = file/'index.html'
    if not file.exists(): return f'dangling link {target}'
    anchor = unquote(parts.fragment)
    if anchor and file in pages and anchor not in pages[file].ids: return f'no anchor {target}'

if __name__ == '__main__':
    what, root = sys.argv[1], Path.cwd()
    sys.path.insert(0, str(root))
    if what == 'readme': (root/'README.md').write_text(readme(root))
    elif what == 'process':
        from nbdev.config import get_config
        process(get_config())
    elif what == 'site': site(root)
    else: sys.exit(__doc__)
