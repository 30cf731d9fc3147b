"Figures 4 to 6, Table 1 and the report from a folder of `train_bridge`'s runs: no judge, no operations counted, a still clip, too few clips for a distance."
import json, math
import pytest
import torch
from flowloss_nb.records import append_log, write_json
from flowloss_nb.runs import run_notebook
from flowloss_nb.strategies import run_record
from flowloss_nb.validation import save_samples

KEYS = ('psnr', 'psnr_changed', 'ssim', 'flow_error', 'flicker')
ABOUT = dict(network='tf_efficientnet_lite0', weights='57ab', stride=None, clips=[3, 3])

def bridge_run(folder, strategy, seed, gain):
    "What `train_bridge` leaves of a run, with numbers of ours."
    protocol = dict(data='/bridge', svd='/svd', steps=200, batch_size=1, lr=1e-5, K=1, reach=1, estimator='dot', frames=4, size=[16, 24], validation_clips=2, test_clips=3, sample_steps=2)
    folder.mkdir(parents=True)
    for step in (100, 200):
        line = {f'{who}/{k}': step/100 + gain*(who == 'sample') + seed/10 for who in ('copy', 'sample') for k in KEYS}
        append_log(folder/'log.jsonl', line | {'kind': 'validation', 'step': step, 'compute_seconds': 3.*step, 'sample/ssim': math.nan})
        append_log(folder/'log.jsonl', dict(kind='train', step=step, seconds=2. + gain, open=1.))
        batch = dict(id=['a', 'b'], prompt=['go', 'go'], video=torch.zeros(2, 4, 3, 16, 24))
        save_samples(folder/'samples'/f'step_{step:07d}', batch['video'] + gain/9, batch)
    judged = {f'{who}/{k}': [2. + gain*(who == 'sample'), 3. + seed/9, math.nan if k == 'psnr_changed' else 4.] for who in ('copy', 'sample') for k in KEYS}
    apart = {'test': {'KVD-lite0': dict(value=1. + gain, se=.1), 'FVD': dict(value=None, why='400 clips are too few')}, 'protocol': {'test': {'KVD-lite0': ABOUT | dict(seeds=[seed])}}}
    record = run_record(folder, judged, apart, strategy=strategy, seed=seed, psi=1., s=1., compute_seconds=600., skipped=0, protocol=protocol)
    write_json(folder/'metrics.json', record)

@pytest.fixture(scope='module')
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp('bridge')
    arms = dict(recon=(0, 1), flow=(0, 1), average_ss=(0, 7), warp=(0,), ungated=(7,))      # w_ss shares one seed with the base, w none
    for strategy, seeds in arms.items():
        for seed in seeds: bridge_run(folder/f'{strategy}{seed}', strategy, seed, .1*len(strategy)*(strategy != 'recon'))
    return folder

@pytest.mark.parametrize('name, params', [('fig4_curves', {}), ('fig5_step100', {}), ('fig6_step1600', dict(step=200, frames=[1, 2, 3])), ('table1_test', {}), ('report', {})])
def test_bridge_runs_are_drawn(sweep, tmp_path, name, params):
    told = json.loads((run_notebook(f'experiments/{name}', tmp_path/'run', dict(folder=str(sweep)) | params)/'metrics.json').read_text())
    assert told['rows']
    if name == 'table1_test':
        assert [r['strategy'] for r in told['differences']] == ['w_ψ'] and [r['strategy'] for r in told['over_clips']] == ['w_ss', 'warping']
        assert told['rows'][0]['KVD-lite0'] == 1. and not {'FVD', 'motion error, px'} & set(told['rows'][0])
    if name == 'fig5_step100': assert [r['strategy'] for r in told['rows']] == ['recon only', 'w_ψ', 'w', 'w_ss', 'warping', 'copy frame 0'] and told['rows'][0]['PSNR, dB'] == 1.05
    if name == 'report':
        said = {r['strategy']: r['KVD-lite0'] for r in told['others']}
        assert said['w'] == 'no shared seed' and said['w_ss'].endswith('one seed') and said['w_ψ'] == '+0.4 (+0.4 to +0.4)' and 'not run' not in str(told['others'])
