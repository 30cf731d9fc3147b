"Figures 4 to 6, Table 1 and the report from a folder of `train_bridge`'s runs (no judge, no operations counted, a still clip, too few clips for a distance), and what they say of the recorded ones."
import json, math
import pytest
import matplotlib, torch
from flowloss_nb.basics.files import write_json
from flowloss_nb.training.checkpoints import append_log
from flowloss_nb.evaluation.validation import save_samples
from flowloss_nb.evaluation.comparison import (
    arms, COPY, fooled, lag, MEASURES, over_seeds, read_sweep, reservations, run_record,
    strategy_rows, with_copy)
from notebooks import NBS
from test_devices import run_cells

KEYS = ('psnr', 'psnr_changed', 'ssim', 'flow_error', 'flicker')
matplotlib.use('agg')
ABOUT = dict(network='tf_efficientnet_lite0', weights='57ab', stride=None, clips=[3, 3])

def bridge_run(folder, strategy, seed, gain):
    "What `train_bridge` leaves of a run, with numbers of ours."
    protocol = dict(data='/bridge', svd='/svd', steps=200, batch_size=1, lr=1e-5, K=1, reach=1, estimator='dot', frames=4, size=[16, 24], validation_clips=2, test_clips=3, sample_steps=2)
    folder.mkdir(parents=True)
    for step in (100, 200):
        line = {f'{who}/{k}': step/100 + gain*(who == 'sample') + seed/10 for who in ('copy', 'sample') for k in KEYS}
        append_log(folder/'log.jsonl', line | {'kind': 'validation', 'step': step, 'compute_seconds': 3.*step, 'sample/ssim': math.nan})
        append_log(folder/'log.jsonl', dict(kind='train', step=step, seconds=2. + gain, open=1., loss=5. - step/100, grad_norm=1., ratio=.25))
        batch = dict(id=['a', 'b'], prompt=['go', 'go'], video=torch.zeros(2, 4, 3, 16, 24))
        save_samples(folder/'samples'/f'step_{step:07d}', batch['video'] + gain/9, batch)
    judged = {f'{who}/{k}': [2. + gain*(who == 'sample'), 3. + seed/9, math.nan if k == 'psnr_changed' else 4.] for who in ('copy', 'sample') for k in KEYS}
    apart = {'test': {'KVD-lite0': dict(value=1. + gain, se=.1), 'FVD': dict(value=None, why='400 clips are too few')}, 'protocol': {'test': {'KVD-lite0': ABOUT | dict(seeds=[seed])}}, 'copy': {'test': {'KVD-lite0': dict(value=.7, se=.1)}}}
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
    book = next((NBS/'experiments').rglob(f'{name}.ipynb'))
    run_cells(book, dict(run_dir=str(tmp_path/'run'), folder=str(sweep)) | params)
    told = json.loads((tmp_path/'run'/'metrics.json').read_text())
    assert told['rows']
    if name == 'table1_test':
        assert [r['strategy'] for r in told['differences']] == ['w_ψ', COPY] and [r['strategy'] for r in told['over_clips']] == ['w_ss', 'warping']
        rows = {r['strategy']: r for r in told['rows']}
        assert rows[COPY]['KVD-lite0'] == pytest.approx(.7) and rows[COPY]['PSNR, dB'] == pytest.approx(3 + 1/54) and told['blind'] == ['set/KVD-lite0']
        assert rows['w']['PSNR, dB'] is None and rows['w_ss']['PSNR, dB'] == pytest.approx(rows['recon only']['PSNR, dB'] + 1/3)
        assert '*seeds: recon only: 0, 1; w_ψ: 0, 1; w: 7; w_ss: 0, 7; warping: 0*' in told['protocol'] and 'median: 0.25' in told['protocol']
        assert told['rows'][0]['KVD-lite0'] == 1. and not {'FVD', 'motion error, px'} & set(told['rows'][0])
    if name == 'fig5_step100': assert [r['strategy'] for r in told['rows']] == ['recon only', 'w_ψ', 'w', 'w_ss', 'warping', 'copy frame 0'] and told['rows'][0]['PSNR, dB'] == 1.05
    if name == 'report':
        said = {r['strategy']: r['KVD-lite0'] for r in told['others']}
        assert said['w'] == 'no shared seed' and said['w_ss'].endswith('one seed') and said['w_ψ'] == '+0.4 (+0.4 to +0.4)' and 'not run' not in str(told['others'])

def test_a_record_keeps_how_training_went(sweep):
    record = json.loads((sweep/'flow0'/'metrics.json').read_text())
    assert record['training'] == [dict(step=100, loss=4., grad_norm=1.), dict(step=200, loss=3., grad_norm=1.)] and record['ratio_median'] == .25

@pytest.fixture(scope='module')
def recorded_runs(): return with_copy(arms(read_sweep(NBS/'results/strategies')))

def test_a_motionless_clip_stands_in_the_table(recorded_runs):
    "By the distances at hand it is ahead of every recorded model: a fact to be told, not to be left out."
    row = next(r for r in strategy_rows(recorded_runs)[0] if r['strategy'] == COPY)
    assert row['KVD-lite0'] == pytest.approx(1.189, abs=1e-3) and row['KD-lite0'] == pytest.approx(.174, abs=1e-3)
    assert {'set/KD-lite0', 'set/KVD-lite0'} <= set(fooled(recorded_runs))

def test_denoised_clips_are_measured(recorded_runs):
    "Where the loss acts it leads: over the first half of training, by F and by the judge."
    for key, value, low, high in (('denoise/1/flow_error', -.875, -1.668, -.081), ('denoise/0.5/epe_moving', -.055, -.076, -.034)):
        half = lambda r: sum(l[key] for l in r['curve'] if l['step'] <= 800)/sum(l['step'] <= 800 for l in r['curve'])
        told = over_seeds(recorded_runs['w_ψ'], recorded_runs['recon only'], half)
        assert key in MEASURES and [told[k] for k in ('difference', 'low', 'high')] == pytest.approx([value, low, high], abs=1e-3)

def test_one_seed_is_not_set_beside_three(recorded_runs):
    "ψ = 0.5 has 1.341 where the base has 1.331 over three seeds, and is worse by 0.046 than its own pair."
    told = over_seeds(recorded_runs['w_ψ, ψ = 0.5'], recorded_runs['recon only'], lambda r: r['test']['set/KVD-lite0'])
    row = next(r for r in strategy_rows(recorded_runs)[0] if r['strategy'] == 'w_ψ, ψ = 0.5')
    assert row['KVD-lite0'] == told['level'] == pytest.approx(1.331 + .046, abs=1e-3) and told['mean'] == pytest.approx(1.341, abs=1e-3)

def test_a_slowdown_is_called_one(recorded_runs):
    told = lag(recorded_runs, 'w_ψ')
    assert told['n'] == told['of'] == 8 and 1370 < told['low'] < told['high'] < 1500

def test_reservations_are_told(recorded_runs):
    "Old records stay readable, and say so: the judge and calibration they had, and code that no commit holds."
    earlier, loose = reservations(recorded_runs)
    assert 'old judge and calibration' in earlier and 'recon only: 0, 1;' in loose and 'w_ls: 0' in loose and 'warping' not in loose
