"""Writes vtrace_rlax.json: the errors and advantages of rlax's V-trace, in float64.

python tests/rl/data/make_vtrace_rlax.py, in an environment of its own with rlax==0.1.9.

`cut` leaves out the action at row CUT, as if its episode had ended at the observation of that row
by its time limit: rlax is run on what is before, bootstrapping from that observation's value, and
on what is after. (The mask of rlax is another thing: it lets the trace pass a masked row.)
"""

import importlib.metadata
import json
import pathlib

import jax
import numpy as np
import rlax

T, CUT = 8, 5
CASES = [(1.0, 1.0), (1.0, 2.0), (0.9, 1.0), (0.6, 1.5)]  # λ and ρ̄; rlax's c̄ is 1


def main() -> None:
    jax.config.update('jax_enable_x64', True)
    rng = np.random.default_rng(0)
    values = rng.normal(size=T + 1).round(3)
    reward, log_rho = rng.normal(size=(2, T)).round(3)
    discount = np.full(T, 0.95)
    discount[2] = 0

    def run(start: int, stop: int, lambda_: float, rho_clip: float) -> dict[str, list[float]]:
        rows = slice(start, stop)
        got = rlax.vtrace_td_error_and_advantage(
            v_tm1=values[rows],
            v_t=values[start + 1 : stop + 1],
            r_t=reward[rows],
            discount_t=discount[rows],
            rho_tm1=np.exp(log_rho[rows]),
            lambda_=lambda_,
            clip_rho_threshold=rho_clip,
            clip_pg_rho_threshold=rho_clip,
        )
        return {'errors': got.errors.tolist(), 'advantages': got.pg_advantage.tolist()}

    cases = []
    for lambda_, rho_clip in CASES:
        options = {'lambda_': lambda_, 'rho_clip': rho_clip}
        pieces = [run(start, stop, **options) for start, stop in ((0, CUT), (CUT + 1, T))]
        cut = {name: pieces[0][name] + [0.0] + pieces[1][name] for name in pieces[0]}
        cases.append(options | {'whole': run(0, T, **options), 'cut': cut})
    record = {
        'rlax': importlib.metadata.version('rlax'),
        'values': values.tolist(),
        'reward_t': reward.tolist(),
        'discount_t': discount.tolist(),
        'log_rho_t': log_rho.tolist(),
        'cut_row': CUT,
        'cases': cases,
    }
    file = pathlib.Path(__file__).with_name('vtrace_rlax.json')
    file.write_text(json.dumps(record) + '\n')


if __name__ == '__main__':
    main()
