"""Checks of a device's share (gpu/kernels/gather.h): the bits are the whole launch's, and nothing else is written."""

from __future__ import annotations

from typing import Any

import numpy as np

from fomoe_io.gpu import kernels
from fomoe_io.gpu.arena import Share
from tests.gpu_shim import reference as ref
from tests.gpu_shim.cases import Handle, Runner, activations, expert_form, normal, poison
from tests.gpu_shim.tile_cases import tiles_of

RUN = 7
NOT_MADE = 0xAA  # of a byte that no launch may touch


class Shared:
    """Experts, and what is computed of them by devices that have a share of each; `ranks` 1: by one that has all."""

    def __init__(
        self, runner: Runner, rng: np.random.Generator, types: tuple[str, str], sizes: tuple[int, int],
        picks: np.ndarray, *, is_biased: bool,
    ) -> None:  # fmt: skip
        (self.gate_type, self.down_type), (self.ff, self.columns) = types, sizes
        self.runner, self.picks, self.experts = runner, picks, int(picks.max()) + 1
        shapes = [(self.gate_type, sizes), (self.gate_type, sizes), (self.down_type, sizes[::-1])]
        self.parts = [
            [ref.random_weights(rng, kind, *shape)[0].reshape(shape[0], -1) for kind, shape in shapes]
            for _ in range(self.experts)
        ]
        self.x, _ = activations(runner, self.gate_type, normal(rng, len(picks), self.columns))
        _, self.form = expert_form(runner, rng, picks, (self.experts, *sizes), is_biased=is_biased)
        self.weights = runner.put(rng.uniform(0.1, 1, picks.shape).astype(np.float32))
        self.shared, self.scalar = (
            runner.put(normal(rng, len(picks), self.columns)),
            runner.put(normal(rng, len(picks))),
        )

    def records(self, share: Share) -> tuple[list[Handle], int, int]:
        """A device's records, and where up and down stand in them."""
        ff, columns = share.of(self.ff), share.of(self.columns)
        own = [[gate[ff], up[ff], down[columns]] for gate, up, down in self.parts]
        handles = [self.runner.put(np.concatenate([part.ravel() for part in parts])) for parts in own]
        return handles, own[0][0].nbytes, 2 * own[0][0].nbytes

    def hidden(self) -> tuple[Handle, Handle]:
        """Room for what gate and up make: Q8 rows and floats."""
        pairs = self.picks.size
        q8 = self.runner.put(np.full((pairs, kernels.q8_row_bytes(self.ff)), NOT_MADE, np.uint8))
        return q8, self.runner.put(poison(pairs, self.ff))

    def merged(self, made: list[np.ndarray], width: int, *, is_q8: bool = False) -> np.ndarray:
        """Each device's own columns; what it left in others' must be what was there."""
        result, ranks = made[0].copy(), len(made)
        for rank, rows in enumerate(made):
            for other in range(ranks):
                own = Share(other, ranks).of(width)
                runs = [own, slice(width + own.start // 4, width + own.stop // 4)] if is_q8 else [own]
                for run in runs:
                    if other == rank:
                        result[:, run] = rows[:, run]
                    else:
                        assert (rows[:, run] == NOT_MADE).all() if is_q8 else np.isnan(rows[:, run]).all()
        return result


def check_alike(whole: tuple[np.ndarray, ...], shared: tuple[np.ndarray, ...]) -> None:
    for expected, found in zip(whole, shared, strict=True):
        assert expected.dtype == np.uint8 or not np.isnan(expected).any()
        np.testing.assert_array_equal(found, expected)


def check_experts_of_shares(
    runner: Runner, rng: np.random.Generator, types: tuple[str, str], sizes: tuple[int, int], ranks: int, *,
    is_biased: bool = False,
) -> None:  # fmt: skip
    """One token's experts: those that are there, one that comes late, and down with the shared expert."""
    picks = rng.permutation(4)[None, :3]
    s, used = Shared(runner, rng, types, sizes, picks, is_biased=is_biased), 3
    run, stop = (runner.put(np.array([value], np.uint32)) for value in (RUN, 0))
    reply = runner.put(np.zeros(2 * used, np.uint64))  # nobody waits: `late` says where the record is

    def make(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        made = []
        q8, floats = s.hidden()  # whole, as every device has it after the exchange
        for share in (Share(rank, count) for rank in range(count)):
            handles, up, down = s.records(share)
            own, out = share.of(s.ff), share.of(s.columns)
            table = np.array([handles[e].pointer for e in picks.ravel()], np.uint64)
            is_late = np.arange(used) == 1
            here, late = (runner.put(np.where(mask, np.uint64(0), table)) for mask in (is_late, ~is_late))
            mine = s.hidden()
            for rows in (mine, (q8, floats)):
                shape = (0, up, s.x, *rows, s.ff, s.columns, used, s.form, own.start)
                grid = kernels.gate_up_grid(own.stop - own.start, used)
                runner.launch(f"experts_gate_up_{types[0]}", grid, here, late, reply, run, stop, *shape, 0)
            made.append((mine, handles, here, late, down, out))
        hidden = [[m[0][k].get() for m in made] for k in (0, 1)]
        results = []
        for _, _, here, late, down, out in made:
            y = runner.put(poison(1, s.columns))
            runner.launch(
                f"experts_down_{types[1]}", kernels.down_grid(out.stop - out.start), here, late, down,
                q8 if types[1] in kernels.QUANTIZED_TYPES else floats, s.weights, s.shared, s.scalar, y, s.columns,
                s.ff, used, s.form, out.start, out.stop - out.start,
            )  # fmt: skip
            results.append(y.get())
        return s.merged(hidden[0], s.ff, is_q8=True), s.merged(hidden[1], s.ff), s.merged(results, s.columns)

    check_alike(make(1), make(ranks))


def check_groups_of_shares(
    runner: Runner, rng: np.random.Generator, types: tuple[str, str], sizes: tuple[int, int], ranks: int, *,
    is_biased: bool = False,
) -> None:  # fmt: skip
    """The same of a batch."""
    tokens, experts, used = 19, 3, 2
    picks = np.stack([rng.choice(experts, used, replace=False) for _ in range(tokens)]).astype(np.int32)
    s = Shared(runner, rng, types, sizes, picks, is_biased=is_biased)

    def make(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        made: list[Any] = []
        q8, floats = s.hidden()
        for share in (Share(rank, count) for rank in range(count)):
            handles, up, down = s.records(share)
            own, out = share.of(s.ff), share.of(s.columns)
            tiles, order = tiles_of(picks, handles, list(range(experts)))
            tile, pairs, mine = runner.put(tiles.view(np.uint8)), runner.put(order), s.hidden()
            for rows in (mine, (q8, floats)):
                runner.launch(
                    f"group_gate_up_{types[0]}", kernels.group_gate_up_grid(own.stop - own.start, len(tiles)), tile,
                    pairs, 0, up, s.x, *rows, s.ff, s.columns, used, s.form, own.start,
                )  # fmt: skip
            made.append((mine, handles, tile, pairs, len(tiles), down, out))
        hidden = [[m[0][k].get() for m in made] for k in (0, 1)]
        results = []
        for _, _, tile, pairs, count_of, down, out in made:
            products, y = runner.put(poison(picks.size, s.columns)), runner.put(poison(tokens, s.columns))
            runner.launch(
                f"group_down_{types[1]}", kernels.group_down_grid(out.stop - out.start, count_of), tile, pairs, down,
                q8 if types[1] in kernels.QUANTIZED_TYPES else floats, products, s.columns, s.ff, out.start,
                out.stop - out.start,
            )  # fmt: skip
            runner.launch(
                "combine_picks", (kernels.up(out.stop - out.start, 256), tokens, 1), products, s.weights, s.shared,
                s.scalar, y, s.columns, used, s.form, out.start, out.stop - out.start,
            )  # fmt: skip
            results.append(y.get())
        return s.merged(hidden[0], s.ff, is_q8=True), s.merged(hidden[1], s.ff), s.merged(results, s.columns)

    check_alike(make(1), make(ranks))


def tagged(words: np.ndarray, run: int = RUN) -> np.ndarray:
    """32-bit words as devices leave them for one another."""
    return np.uint64(run) << np.uint64(32) | words.view(np.uint32).ravel().astype(np.uint64)


def check_gather_floats(runner: Runner, rng: np.random.Generator, words: list[int], ranks: int) -> None:
    """What the others have left comes, what this one has made is left; whichever of the devices it is."""
    whole = [normal(rng, ranks, count) for count in words]
    unused, total = kernels.MAT_VEC_MANY - len(words), sum(words)
    left = np.stack([tagged(np.concatenate([v[rank] for v in whole])) for rank in range(ranks)])
    for rank in range(ranks):
        vectors = [np.full_like(v, np.nan) for v in whole]
        for vector, values in zip(vectors, whole, strict=True):
            vector[rank] = values[rank]
        there = left.copy()
        there[rank] = tagged(np.zeros(total, np.uint32), RUN - 1)  # of the run before
        handles, slots = [runner.put(v) for v in vectors], runner.put(there)
        grid = kernels.gather_grid(total)
        runner.launch(
            "gather_floats", grid, *handles, *[None] * unused, *words, *[0] * unused, slots, slots,
            runner.put(np.array([RUN], np.uint32)), runner.put(np.zeros(1, np.uint32)), rank, ranks, grid[0],
        )  # fmt: skip
        for handle, values in zip(handles, whole, strict=True):
            np.testing.assert_array_equal(handle.get(), values)
        np.testing.assert_array_equal(slots.get(), left)


def check_gather_hidden(
    runner: Runner, rng: np.random.Generator, columns: int, pairs: int, ranks: int, *, has_floats: bool
) -> None:
    """As above, of rows of pairs: through a memory that is written and another that is read."""
    q8, floats = ref.q8(normal(rng, pairs, columns))[0], normal(rng, pairs, columns)
    used = columns + columns // 4
    each = []
    for rank in range(ranks):
        own = Share(rank, ranks).of(columns)
        runs = [own, slice(columns + own.start // 4, columns + own.stop // 4)]
        each.append(floats[:, own] if has_floats else np.concatenate([q8[:, run] for run in runs], axis=1))
    left = np.stack([tagged(np.ascontiguousarray(rows)) for rows in each])
    for rank in range(ranks):
        own = Share(rank, ranks).of(columns)
        mine, mine_floats = np.full_like(q8, NOT_MADE), np.full_like(floats, np.nan)
        for run in (own, slice(columns + own.start // 4, columns + own.stop // 4)):
            mine[:, run] = q8[:, run]
        mine_floats[:, own] = floats[:, own]
        there = left.copy()
        there[rank] = 0
        hidden, hidden_floats = runner.put(mine), runner.put(mine_floats)
        out, in_ = runner.put(np.zeros_like(left)), runner.put(there)
        grid = kernels.gather_grid(left.shape[1])
        runner.launch(
            "gather_hidden", grid, hidden, hidden_floats if has_floats else None, columns, pairs, out, in_,
            runner.put(np.array([RUN], np.uint32)), runner.put(np.zeros(1, np.uint32)), rank, ranks, grid[0],
        )  # fmt: skip
        if has_floats:
            np.testing.assert_array_equal(hidden_floats.get(), floats)
        else:
            np.testing.assert_array_equal(hidden.get()[:, :used], q8[:, :used])
        np.testing.assert_array_equal(out.get()[rank], left[rank])
        assert not np.delete(out.get(), rank, axis=0).any()


def check_gather_ends(runner: Runner, rng: np.random.Generator) -> None:
    """A word that does not come, and the host says stop: what has come before is there, the rest as it was."""
    words, grid = 3, kernels.gather_grid(3)
    slots = np.zeros((2, words), np.uint64)
    slots[1] = tagged(np.arange(words).astype(np.float32))
    slots[1, 1] = tagged(np.ones(1, np.float32), RUN - 1)[0]
    vector = runner.put(np.full((2, words), 5, np.float32))
    unused = kernels.MAT_VEC_MANY - 1
    memory = runner.put(slots)
    runner.launch(
        "gather_floats", grid, vector, *[None] * unused, words, *[0] * unused, memory, memory,
        runner.put(np.array([RUN], np.uint32)), runner.put(np.ones(1, np.uint32)), 0, 2, grid[0],
    )  # fmt: skip
    found = vector.get()
    assert found[1, 1] == 5 and (found[0] == 5).all()
    assert found[1, 0] == 0 and found[1, 2] == 2


def check_exchange_of_a_batch(runner: Runner, rng: np.random.Generator, columns: int, ranks: int) -> None:
    """Of the pairs of a wave alone, and of rows of floats: each has left its columns, then each fetches the others'."""
    picks = np.stack([rng.choice(3, 2, replace=False) for _ in range(19)]).astype(np.int32)
    here, pairs = picks.ravel() != 1, picks.size  # the wave is experts 0 and 2
    tiles, order = tiles_of(picks, [runner.put(np.zeros(16, np.uint8))] * 3, [0, 2])
    wave = runner.put(tiles.view(np.uint8)), runner.put(order)
    q8, floats = ref.q8(normal(rng, pairs, columns))[0], normal(rng, pairs, columns)
    used = columns + columns // 4
    shares = [Share(rank, ranks).of(columns) for rank in range(ranks)]
    for is_float, whole in ((False, q8), (True, floats), (None, floats)):
        common, mine = runner.put(np.full_like(whole, 9)), []
        for own in shares:
            rows = np.full_like(whole, 5)
            for run in (
                (own,) if is_float is not False else (own, slice(columns + own.start // 4, columns + own.stop // 4))
            ):
                rows[:, run] = whole[:, run]
            mine.append(runner.put(rows))
        for kernel in ("leave", "fetch"):
            for rows, own in zip(mine, shares, strict=True):
                at = (columns, own.start, own.stop - own.start)
                if is_float is None:
                    grid = (kernels.up(columns, 256), pairs, 1)
                    runner.launch(f"{kernel}_floats", grid, rows, common, *at)
                else:
                    what = (None, rows) if is_float else (rows, None)
                    runner.launch(f"{kernel}_hidden", (len(tiles), 1, 1), *wave, *what, common, *at)
        for rows, own in zip(mine, shares, strict=True):
            found, most = rows.get(), used if is_float is False else columns
            np.testing.assert_array_equal(found[here, :most], whole[here, :most])
            if is_float is None:
                np.testing.assert_array_equal(found, whole)
            else:
                assert (np.delete(found[~here, :columns], np.r_[own], axis=1) == 5).all()
                assert (common.get()[~here] == 9).all()
