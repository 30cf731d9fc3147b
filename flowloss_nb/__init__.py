__version__ = "0.0.1"

# The names a user starts with, imported on first use, so that `import flowloss_nb` costs nothing. This file is
# written by hand: nbdev_export keeps it and sets the version above. Everything else is exported from nbs/.
_WHERE = {
    'basics.clips': ('ClipSet', 'take', 'show_clip'),
    'data.metaworld': ('load_clips',),
    'flow.fields': ('flow_to_rgb',),
    'flow.dot': ('load_dot',),
    'flow.estimators': ('small_estimator',),
    'diffusion.edm': ('denoise', 'loss_weight', 'sample'),
    'diffusion.codecs': ('fit_linear',),
    'diffusion.denoiser': ('small_denoiser', 'generate'),
    'training.losses': ('flow_objective', 'recon_objective', 'hard_gate', 'soft_gate'),
    'training.step': ('TrainParams',),
    'training.trainer': ('train',),
    'runs.runs': ('run_notebook',)}
_MODULES = {name: module for module, names in _WHERE.items() for name in names}

__all__ = list(_MODULES)

def __dir__(): return sorted([*globals(), *__all__])

def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}; it offers {", ".join(__all__)}. '
                             'Import the rest from its chapter, e.g. `import flowloss_nb.training.losses`')
    from importlib import import_module
    globals()[name] = value = getattr(import_module(f'{__name__}.{_MODULES[name]}'), name)
    return value
