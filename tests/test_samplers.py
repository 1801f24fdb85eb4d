"""Samplers of other papers as rules: their orders, their choices, and whether they draw from the model's law."""

import itertools
import math
import pickle

import numpy as np
import pytest
import torch

from mgt_sampler import generate, samplers
from mgt_sampler.calibration import best_ratios, calibrate_schedule, masked_nll
from mgt_sampler.counts import Ratio
from mgt_sampler.draw import Draw
from mgt_sampler.models.markov import MarkovModel, total_variation
from mgt_sampler.order import CheckerboardOrder, FixedOrder, HaltonOrder, halton_positions
from mgt_sampler.samplers import SAMPLERS
from mgt_sampler.schedules import mask_lens, schedule_values
from mgt_sampler.selection import Commit, MaskLowest, PathPlanning, ReMDM, Repulsion, Stable
from mgt_sampler.step import Rule

CHAIN = MarkovModel()


class Grid:
    """8 x 8 tokens of 12 whose logits depend on the place, the neighbours and the number of masked positions."""

    num_tokens, codebook_size, mask_token_id = 64, 12, 12

    def __init__(self, sharpness=1.0):
        generator = torch.Generator().manual_seed(0)
        self.places = sharpness * torch.randn(64, 12, generator=generator)
        self.beside = sharpness * torch.randn(2, 13, 12, generator=generator)
        self.counts = torch.randn(65, 12, generator=generator)
        self.calls = 0

    def predict_logits(self, tokens, condition):
        self.calls += 1
        count = self.counts[(tokens == 12).sum(1)][:, None]
        logits = self.places + self.beside[0][tokens.roll(1, 1)] + self.beside[1][tokens.roll(8, 1)] + count
        return logits if condition is None else logits + 0.3 * condition[:, None, None]

    def decode(self, tokens):
        return tokens[:, None, None].float() / 12


def draw(rule, seeds=(4, 9, 11), steps=6, model=None, tokens=None, **options):
    seen = []
    output = generate(
        model or Grid(), rule, seed=list(seeds), num_inference_steps=steps, tokens=tokens, progress=False,
        callback=seen.append, **options,
    )  # fmt: skip
    return output, seen


def masked(seen):
    return [step.mask.sum(1).tolist() for step in seen]


@pytest.mark.parametrize("name", SAMPLERS)
class TestEverySampler:
    def test_a_sample_alone_equals_itself_in_a_batch(self, name):
        tokens = torch.full((3, 64), 12)
        tokens[1, 5:40] = 3
        tokens[2, 1:] = 7
        both, _ = draw(SAMPLERS[name](), tokens=tokens, steps=None)
        for i, seed in enumerate((4, 9, 11)):
            alone, _ = draw(SAMPLERS[name](), [seed], tokens=tokens[i : i + 1], steps=None)
            assert torch.equal(alone.tokens[0], both.tokens[i])

    def test_every_backend_draws_the_same(self, name, backend):
        one, other = (draw(SAMPLERS[name](), backend=each)[0].tokens for each in (backend, "scalar"))
        assert torch.equal(one, other)

    def test_known_tokens_stay_and_none_is_left_masked(self, name):
        tokens = torch.full((3, 64), 12)
        tokens[:, 10:30] = 5
        output, seen = draw(SAMPLERS[name](), tokens=tokens)
        assert (output.tokens < 12).all() and (output.tokens[:, 10:30] == 5).all()
        assert all((step.tokens[:, 10:30] == 5).all() and not step.mask[:, 10:30].any() for step in seen)

    def test_one_step_and_more_steps_than_positions(self, name):
        for steps in (1, 70):
            output, seen = draw(SAMPLERS[name](), steps=steps)
            assert (output.tokens < 12).all() and len(seen) <= 2 * steps

    def test_rules_are_equal_and_can_be_pickled(self, name):
        rule = SAMPLERS[name](guidance_scale=(1.0, 3.0))
        assert rule == SAMPLERS[name](guidance_scale=[1.0, 3.0])
        assert pickle.loads(pickle.dumps(rule)) == rule and hash(rule) == hash(pickle.loads(pickle.dumps(rule)))

    def test_argument_names_are_checked(self, name):
        with pytest.raises(TypeError, match="beauty"):
            SAMPLERS[name](beauty=3)

    def test_what_it_takes_makes_a_difference(self, name):
        for change in ({"repulsion": 2.0}, {"mask_schedule": "square"}, {"temperature": 3.0}, {"noise_scale": 1.0}):
            try:
                rule = SAMPLERS[name](**change)
            except TypeError:
                continue
            assert rule != SAMPLERS[name]()
            assert not torch.equal(draw(rule)[0].tokens, draw(SAMPLERS[name]())[0].tokens)


@pytest.mark.parametrize("name", ["random", "halton", "checkerboard", "margin", "entropy", "max_probability"])
def test_an_order_that_does_not_look_at_the_draw_is_exact_at_one_token_a_step(name):
    rule = SAMPLERS[name](mask_schedule=[1 - (k + 1) / 6 for k in range(6)])
    if name in ("halton", "checkerboard"):
        # of a sequence
        score = {"halton": HaltonOrder((1, 6)), "checkerboard": CheckerboardOrder((1, 6))}[name]
        rule = rule.but(score=score)
    output = generate(CHAIN, rule, num_samples=20000, num_inference_steps=6, seed=1, progress=False)
    distance, noise = total_variation(CHAIN, output.tokens)
    assert distance < 1.06 * noise


def test_the_order_by_confidence_is_not():
    rule = samplers.maskgit(mask_schedule=[1 - (k + 1) / 6 for k in range(6)])
    output = generate(CHAIN, rule, num_samples=20000, num_inference_steps=6, seed=1, progress=False)
    distance, noise = total_variation(CHAIN, output.tokens)
    assert distance > 2 * noise


def test_repulsion_brings_few_steps_near_the_truth():
    """Three steps of two tokens: neighbours drawn together are what hurts."""
    distances = []
    for repulsion in (0.0, 2.0):
        rule = samplers.entropy(mask_schedule=[2 / 3, 1 / 3, 0.0], repulsion=repulsion)
        if repulsion:
            rule = rule.but(select=Repulsion(Ratio((0.67, 0.34, 0.0)), 0.0, repulsion, grid=(1, 6)))
        output = generate(CHAIN, rule, num_samples=20000, num_inference_steps=3, seed=1, progress=False)
        distances.append(total_variation(CHAIN, output.tokens)[0])
    assert distances[1] < 0.5 * distances[0]


class TestOrders:
    def test_the_halton_sequence(self):
        # the first cells of Halton-MaskGIT at 16 x 16: row and column
        assert [divmod(p, 16) for p in halton_positions(16, 16)[:4]] == [(8, 5), (4, 10), (12, 1), (2, 7)]
        for grid in [(8, 8), (64, 64), (5, 9), (1, 7), (7, 1)]:
            assert sorted(halton_positions(*grid)) == list(range(grid[0] * grid[1]))

    def test_halton_starts_elsewhere_for_each_seed(self):
        _, seen = draw(samplers.halton(), range(40))
        first = {tuple(row.nonzero()[:, 0].tolist()) for row in ~seen[0].mask}
        assert len(first) > 20
        _, seen = draw(samplers.halton(roll=False), range(40))
        assert len({tuple(row.tolist()) for row in seen[0].mask}) == 1
        count = int((~seen[0].mask[0]).sum())
        assert set((~seen[0].mask[0]).nonzero()[:, 0].tolist()) == set(halton_positions(8, 8)[:count])

    def test_one_colour_comes_first(self):
        rule = samplers.checkerboard(mask_schedule=[0.75, 0.5, 0.25, 0.0])
        _, seen = draw(rule, range(30), steps=4)
        colour = (torch.arange(64) // 8 + torch.arange(64) % 8) % 2
        known = ~seen[1].mask
        shares = (known & (colour == 0)).sum(1)
        assert (known.sum(1) == 32).all() and set(shares.tolist()) == {0, 32}
        # within a colour the order is random
        assert len({tuple(row.tolist()) for row in seen[0].mask}) > 25

    def test_random_order_is_uniform(self):
        _, seen = draw(samplers.random(mask_schedule=[0.5, 0.0]), range(4000), steps=2)
        counts = seen[0].mask.sum(0).double()
        assert ((counts - 2000) ** 2 / 1000).sum() < 110

    @pytest.mark.parametrize("name, sign", [("margin", 1), ("entropy", -1), ("max_probability", 1)])
    def test_orders_by_a_statistic(self, name, sign):
        model = Grid()
        _, seen = draw(SAMPLERS[name](), model=model)
        logits = model.predict_logits(torch.full((3, 64), 12), None).double()
        p = logits.softmax(-1)
        top = p.topk(2).values
        score = {
            "margin": top[..., 0] - top[..., 1],
            "entropy": -(p * p.log()).sum(-1),
            "max_probability": top[..., 0],
        }[name]
        count = int((~seen[0].mask[0]).sum())
        expected = set((sign * score)[0].topk(count).indices.tolist())
        assert set((~seen[0].mask[0]).nonzero()[:, 0].tolist()) == expected

    def test_a_given_order(self):
        positions = torch.randperm(64, generator=torch.Generator().manual_seed(1)).tolist()
        _, seen = draw(samplers.by_order(FixedOrder(positions)))
        for step in seen[:-1]:
            left = int(step.mask[0].sum())
            assert set(step.mask[0].nonzero()[:, 0].tolist()) == set(positions[64 - left :])
        with pytest.raises(ValueError, match=r"^positions: expected each of 0 to N - 1 once, got 2"):
            FixedOrder((1, 1))
        with pytest.raises(ValueError, match=r"^positions: expected 64 of them, got 2"):
            draw(samplers.by_order(FixedOrder((1, 0))))

    def test_grids_are_checked(self):
        for score in (HaltonOrder((3, 4)), CheckerboardOrder((3, 4))):
            with pytest.raises(ValueError, match=r"^grid: expected \(H, W\) with 64 cells, got 3 x 4"):
                draw(samplers.by_order(score))


def test_the_moment_samplers_law():
    """One of two positions becomes known: P(i, x) ~ p_i(x)^beta, whichever order it is drawn in."""

    class Pair(Grid):
        num_tokens = 2
        logits = torch.tensor([[1.0, 0.0, -1.0], [0.2, 0.1, 0.0]])
        codebook_size = mask_token_id = 3

        def predict_logits(self, tokens, condition):
            return self.logits.expand(len(tokens), -1, -1).contiguous()

    count, alpha = 20000, 0.5
    rule = samplers.moment(mask_schedule=[0.5, 0.0], temperature=alpha)
    _, seen = draw(rule, range(count), steps=2, model=Pair())
    beta = 1 + 1 / alpha
    weights = (beta * Pair.logits.double().log_softmax(-1)).exp()
    expected = count * weights / weights.sum()
    found = torch.zeros(2, 3, dtype=torch.float64)
    for i in range(2):
        known = ~seen[0].mask[:, i]
        found[i] = seen[0].tokens[known, i].bincount(minlength=3)
    assert found.sum() == count
    assert ((found - expected) ** 2 / expected).sum() < 22


class TestBounds:
    """Commits by a bound, against the same written with a sort."""

    @staticmethod
    def expected(model, name, bound, step, before):
        logits = model.predict_logits(torch.where(before, 12, step.tokens), None).double()
        p = logits.log_softmax(-1)
        if name == "entropy_bound":
            score = -(p.exp() * p).sum(-1)
            order = score.masked_fill(~before, math.inf).argsort(-1)
            h = score.gather(-1, order).masked_fill(~before.gather(-1, order), math.inf)
            ok = h.cumsum(-1) - h.cummax(-1).values <= bound
        else:
            chosen = p.gather(-1, step.tokens[..., None])[..., 0].exp().masked_fill(~before, -1.0)
            order = chosen.argsort(-1, descending=True)
            sorted_p = chosen.gather(-1, order)
            n = torch.arange(1, 65, dtype=torch.float64)
            ok = sorted_p >= bound if name == "threshold" else (n + 1) * (1 - sorted_p) <= bound
        count = torch.where(ok, torch.arange(1, 65), 0).max(-1).values.clamp(min=1)
        return [set(order[b, : int(count[b])].tolist()) for b in range(len(order))]

    @pytest.mark.parametrize("name, bound", [("entropy_bound", 3.0), ("threshold", 0.8), ("factor", 1.0)])
    def test_as_many_as_the_bound_allows(self, name, bound):
        model = Grid(2.0)
        rule = SAMPLERS[name](bound)
        output, seen = draw(rule, model=model, steps=None)
        assert output.model_calls == len(seen) < 64
        before, sizes = torch.ones(3, 64, dtype=torch.bool), set()
        for step in seen[:-1]:
            newly = before & ~step.mask
            wanted = self.expected(model, name, bound, step, before)
            for b in range(3):
                if before[b].any():
                    assert set(newly[b].nonzero()[:, 0].tolist()) == wanted[b]
                    sizes.add(len(wanted[b]))
            before = step.mask
        assert len(sizes) > 1

    def test_bad_bounds_are_named(self):
        with pytest.raises(ValueError, match=r"^factor: expected one bound at most, got threshold and factor"):
            Commit(threshold=0.5, factor=1.0)
        with pytest.raises(ValueError, match=r"^threshold: expected a number in \[0, 1\], got 90"):
            Commit(threshold=90)
        # the edit of a draw that does not read known tokens would never happen
        with pytest.raises(ValueError, match=r"^draw: expected one with rows 'all'"):
            Rule(select=Commit(replace_above=0.5))
        with pytest.raises(ValueError, match=r"^draw: expected one with differential"):
            draw(Rule(select=Stable()))
        with pytest.raises(ValueError, match=r"^penalty, radius: expected at least 0 and 1"):
            Repulsion(penalty=-1.0)


def test_klass_against_float64():
    """Greedy tokens that are probable, and whose law has been the same for two steps; else the most probable one."""
    model = Grid(2.5)
    output, seen = draw(samplers.klass(0.6, 0.05), model=model, steps=None)
    tokens, known = torch.full((3, 64), 12), torch.zeros(3, 64, dtype=torch.bool)
    history, stable, together = None, torch.zeros(3, 64), 0
    for step in seen:
        p = model.predict_logits(tokens, None).double().log_softmax(-1)
        best = p.max(-1)
        if history is not None:
            close = (p.exp() * (p - history)).sum(-1) < 0.05
            stable = torch.where(close, stable + 1, 0)
        history = p
        for b in range(3):
            if known[b].all():
                continue
            passes = ~known[b] & (stable[b] >= 2) & (best.values[b].exp() > 0.6)
            if not passes.any():
                passes[best.values[b].masked_fill(known[b], -math.inf).argmax()] = True
            together = max(together, int(passes.sum()))
            tokens[b][passes] = best.indices[b][passes]
            known[b] |= passes
        assert torch.equal(known, ~step.mask)
    assert together > 1 and torch.equal(tokens, output.tokens) and len(seen) < 64


class TestRepulsion:
    def test_without_a_penalty_it_is_the_order(self):
        for temperature in (0.0, 2.0):
            one, _ = draw(Rule(select=Repulsion(Ratio(), temperature, 0.0)))
            other, _ = draw(Rule(select=MaskLowest(Ratio(), temperature)))
            assert torch.equal(one.tokens, other.tokens)

    def test_neighbours_wait(self):
        rule = Rule(select=Repulsion(Ratio((0.85, 0.7, 0.55, 0.4, 0.2, 0.0)), 1.0, 1e4))
        _, seen = draw(rule, range(8))
        first = ~seen[0].mask.view(8, 8, 8)
        assert (first.sum((1, 2)) == 10).all()
        touching = [
            first & first.roll(shift, (1, 2)) for shift in itertools.product((-1, 0, 1), repeat=2) if shift != (0, 0)
        ]
        # the grid does not go round
        inside = torch.zeros(8, 8, dtype=torch.bool)
        inside[1:-1, 1:-1] = True
        assert not any((t & inside).any() for t in touching)
        plain = ~draw(Rule(select=MaskLowest(Ratio((0.85, 0.7, 0.55, 0.4, 0.2, 0.0)), 1.0)), range(8))[1][0].mask.view(
            8, 8, 8
        )
        assert any((plain & plain.roll(shift, (1, 2)) & inside).any() for shift in ((0, 1), (1, 0), (1, 1)))

    def test_counts_are_those_of_the_schedule(self):
        _, seen = draw(samplers.maskgit(repulsion=2.0))
        assert masked(seen) == [[n] * 3 for n in mask_lens("cosine", 6, 64)]


class TestReMDM:
    @pytest.mark.parametrize("strategy", ["cap", "rescale", "conf", "loop"])
    def test_counts_and_how_many_are_masked_again(self, strategy):
        rule = samplers.remdm(strategy, 0.3, (0.4, 0.8) if strategy == "loop" else (0.0, 1.0))
        _, seen = draw(rule, range(6), steps=8)
        assert masked(seen) == [[n] * 6 for n in mask_lens("cosine", 8, 64)]
        for k, (before, after) in enumerate(itertools.pairwise(seen)):
            again = (~before.mask & after.mask).sum(1)
            num_known = int((~before.mask[0]).sum())
            left = int(after.mask[0].sum())
            room = min(left / num_known, 1)
            sigma = min(0.3, room) if strategy in ("cap", "loop") else 0.3 * room
            if k + 1 == 7 or (strategy == "loop" and not 0.4 <= (k + 1) / 8 < 0.8):
                sigma = 0.0
            expected = min(round(float(np.float32(sigma) * num_known)), left, num_known)
            assert (again == expected).all()

    def test_conf_masks_the_improbable_more_often(self):
        probabilities = []
        for strategy in ("rescale", "conf"):
            _, seen = draw(samplers.remdm(strategy, 0.3), range(400), steps=6, model=Grid(0.6))
            found = []
            for before, after in itertools.pairwise(seen[:3]):
                again = ~before.mask & after.mask & before.logprob.isfinite()
                found.append(before.logprob[again].exp())
            probabilities.append(float(torch.cat(found).mean()))
        assert probabilities[1] < probabilities[0]

    def test_an_interval_is_for_loop_alone(self):
        with pytest.raises(ValueError, match=r"^interval: expected \(start, end\), with strategy loop alone"):
            ReMDM(strategy="cap", interval=(0.2, 0.5))
        with pytest.raises(ValueError, match=r"^eta: expected a number in \[0, 1\], got 2"):
            ReMDM(eta=2)

    def test_an_unknown_strategy_is_named(self):
        with pytest.raises(ValueError, match=r"^strategy: expected cap, rescale, conf or loop, got 'hope'"):
            ReMDM(strategy="hope")


class TestPathPlanning:
    def test_eta_0_is_maskgit(self):
        one, other = draw(samplers.path_planning(0.0))[0], draw(samplers.maskgit())[0]
        assert torch.equal(one.tokens, other.tokens)

    def test_the_lowest_of_all_positions_are_masked(self):
        model = Grid()
        _, seen = draw(samplers.path_planning(1.0, temperature=0.0), model=model)
        assert masked(seen) == [[n] * 3 for n in mask_lens("cosine", 6, 64)]
        came_back = 0
        for before, after in itertools.pairwise(seen[:-1]):
            tokens = before.tokens.masked_fill(before.mask, 12)
            p = model.predict_logits(tokens, None).double().log_softmax(-1)
            score = p.gather(-1, after.tokens[..., None])[..., 0]
            count = int(after.mask[0].sum())
            for b in range(3):
                lowest = set(score[b].topk(count, largest=False).indices.tolist())
                assert lowest == set(after.mask[b].nonzero()[:, 0].tolist())
            came_back += int((~before.mask & after.mask).sum())
        assert came_back > 0


class TestCorrection:
    def test_the_least_likely_known_tokens_are_drawn_anew(self):
        model = Grid()
        _, seen = draw(samplers.informed_correction(5, [1, 3]), model=model)
        assert [step.step for step in seen] == [0, 1, 1, 2, 3, 3, 4, 5]
        assert model.calls == 6 + 2 * 2
        first, second = seen[1], seen[2]
        assert (first.mask.sum(1) == second.mask.sum(1)).all()
        tokens = first.tokens.masked_fill(first.mask, 12)
        p = model.predict_logits(tokens, None).double().log_softmax(-1)
        own = p.gather(-1, first.tokens[..., None])[..., 0].masked_fill(first.mask, math.inf)
        for b in range(3):
            changed = (second.tokens[b] != first.tokens[b]) & ~first.mask[b]
            lowest = own[b].topk(5, largest=False).indices
            assert set(changed.nonzero()[:, 0].tolist()) <= set(lowest.tolist())
        assert (second.tokens != first.tokens)[~first.mask].any()

    def test_at_random_it_takes_no_call(self):
        model = Grid()
        draw(samplers.informed_correction(5, [1, 3], "random"), model=model)
        assert model.calls == 6 + 2

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ((0,), r"^num_tokens: expected at least 1, got 0"),
            ((3, [-1]), r"^steps: expected steps at least 0, got -1"),
            ((3, None, "worst"), r"^variant: expected one of \('paper', 'random'\), got 'worst'"),
        ],
    )
    def test_bad_arguments_are_named(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            samplers.informed_correction(*arguments)


class TestSchedules:
    def test_a_part_of_the_steps(self):
        assert schedule_values("interval:3:0.25:0.75", 8) == [1, 1, 3, 3, 3, 3, 1, 1]
        model = Grid()
        output = generate(
            model,
            samplers.maskgit(guidance_scale="interval:3:0.5:1"),
            labels=[1, 2],
            num_inference_steps=8,
            progress=False,
        )
        assert output.model_calls == model.calls == 12

    def test_growing_guidance(self):
        values = schedule_values("power_cosine:5:2", 4)
        assert values[0] == 1 and values[2] == pytest.approx(1 + 4 * (1 - math.cos(math.pi / 4)) / 2)

    def test_functions(self):
        assert schedule_values(lambda k, steps: k / steps, 4) == [0, 0.25, 0.5, 0.75]

    @pytest.mark.parametrize(
        "bad", ["interval:3", "interval:3:0:1:2", "power_cosine:3", "linear:1:2", "interval:a:0:1"]
    )
    def test_bad_strings_are_named(self, bad):
        with pytest.raises(ValueError, match=r"^value: expected a number, .*interval:SCALE:START:END"):
            schedule_values(bad, 4)


class TestCalibration:
    def test_the_best_schedule_is_found(self):
        """Against all compositions of 9 positions into 4 steps."""
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            profile = torch.rand(9, generator=generator, dtype=torch.float64).cumsum(0).flip(0).tolist()

            def loss(bounds, profile=profile):
                return sum(
                    sum(profile[a] - profile[i] for i in range(a, b)) for a, b in itertools.pairwise((0, *bounds, 9))
                )

            best = min(loss(bounds) for bounds in itertools.combinations(range(1, 9), 3))
            known = [9 - math.floor(ratio * 9) for ratio in best_ratios(profile, 4)]
            assert known[-1] == 9 and loss(known[:-1]) == pytest.approx(best)

    def test_it_is_what_generate_does(self):
        ratios = best_ratios(np.exp(-np.arange(64) / 8).tolist(), 5)
        _, seen = draw(samplers.maskgit(mask_schedule=ratios), steps=5)
        assert masked(seen) == [[math.floor(ratio * 64)] * 3 for ratio in ratios]
        # what is learnt at first is most: few at first, many at last
        counts = [64, *(n[0] for n in masked(seen))]
        steps = [a - b for a, b in itertools.pairwise(counts)]
        assert steps == sorted(steps)

    def test_from_a_model(self):
        model = Grid()
        tokens = draw(samplers.random(), range(30), steps=64)[0].tokens
        ratios = calibrate_schedule(model, tokens, 4, num_levels=5, progress=False)
        assert len(ratios) == 4 and ratios[-1] == 0 and ratios == sorted(ratios, reverse=True)
        assert ratios == calibrate_schedule(model, tokens, 4, num_levels=5, batch_size=7, progress=False)
        # nothing known: the mean of log p under the first call's logits
        p = model.predict_logits(torch.full_like(tokens, 12), None).double().log_softmax(-1)
        expected = -p.gather(-1, tokens[..., None]).mean()
        assert masked_nll(model, tokens, 0) == pytest.approx(float(expected), abs=1e-5)

    def test_bad_arguments_are_named(self):
        with pytest.raises(ValueError, match=r"^num_inference_steps: expected at most the 3 positions, got 4"):
            best_ratios([3.0, 2.0, 1.0], 4)
        with pytest.raises(TypeError, match=r"^tokens: expected int64"):
            calibrate_schedule(Grid(), torch.zeros(0, 64, dtype=torch.int64), 4)
        with pytest.raises(ValueError, match=r"^num_levels: expected at least 2"):
            calibrate_schedule(Grid(), torch.zeros(1, 64, dtype=torch.int64), 4, num_levels=1)


@pytest.mark.parametrize("select", [Stable(), Commit(threshold=0.5), PathPlanning(), Repulsion()])
def test_selections_are_values(select):
    assert select == type(select)(**vars(select)) and pickle.loads(pickle.dumps(select)) == select
    assert Draw() == Draw()
