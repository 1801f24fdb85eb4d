"""Rules, states and steps: what `generate` is made of."""

import json
import pickle
import subprocess
import sys

import pytest
import torch

from mgt_sampler import Differential, ZSampling, generate, samplers
from mgt_sampler.counts import Ratio
from mgt_sampler.draw import Draw
from mgt_sampler.models.markov import MarkovModel
from mgt_sampler.selection import MaskLowest, keep_all
from mgt_sampler.state import Logits
from mgt_sampler.step import Rule, begin, take_step, take_steps

MODEL = MarkovModel(24, 6, seed=1)
TECHNIQUES = {
    "plain": {},
    "noise": {"noise_scale": "abs_cos:2", "token_temperature": (1.0, 0.5)},
    "differential": {"differential": Differential()},
    "z": {"z_sampling": ZSampling()},
    "momentum": {"momentum": 0.3},
    "skip": {"momentum": 0.3, "skip": [2, 4]},
    "all": {
        "noise_scale": 1.0,
        "differential": Differential(),
        "z_sampling": ZSampling(),
        "momentum": 0.2,
        "skip": [3],
    },
}


def sample(**options):
    return generate(MODEL, **{"num_samples": 3, "num_inference_steps": 7, "seed": 5, "progress": False, **options})


@pytest.mark.parametrize("technique", TECHNIQUES.values(), ids=TECHNIQUES)
class TestStopped:
    @pytest.mark.parametrize("stop", [0, 3, 6])
    def test_a_generation_goes_on_where_it_was_stopped(self, technique, stop):
        saved = []

        def save(step):
            if step.state is not None and step.step == stop:
                saved.append(pickle.dumps(step.state))

        whole = sample(callback=save, **technique)
        rest = generate(MODEL, state=pickle.loads(saved[0]), progress=False, **technique)
        assert torch.equal(rest.tokens, whole.tokens) and torch.equal(rest.seed, whole.seed)
        assert rest.model_calls < whole.model_calls or stop == 0


def test_a_generation_goes_on_in_another_process(tmp_path):
    class StopError(Exception):
        pass

    def stop(step):
        if step.state is not None and step.step == 3:
            (tmp_path / "state.pickle").write_bytes(pickle.dumps((step.state, TECHNIQUES["all"])))
            raise StopError

    with pytest.raises(StopError):
        sample(callback=stop, **TECHNIQUES["all"])
    script = (
        "import json, pickle\n"
        "from mgt_sampler import generate\n"
        "from mgt_sampler.models.markov import MarkovModel\n"
        f"state, technique = pickle.load(open({str(tmp_path / 'state.pickle')!r}, 'rb'))\n"
        "output = generate(MarkovModel(24, 6, seed=1), state=state, progress=False, **technique)\n"
        "print(json.dumps(output.tokens.tolist()))\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == sample(**TECHNIQUES["all"]).tokens.tolist()


def test_the_loop_itself_can_be_stopped_anywhere():
    rule = samplers.maskgit(noise_scale=1.0)
    calls = []

    def predict(tokens, scale):
        calls.append(scale)
        return MODEL.predict_logits(tokens, None), None

    def start():
        seeds = torch.arange(3) + 7
        return begin(torch.full((3, 24), 6), seed=seeds, mask_token_id=6, num_inference_steps=5)

    whole = [state.tokens for state, _ in take_steps(rule, predict, start())]
    assert len(calls) == 5 and (whole[-1] < 6).all()
    for k in range(5):
        state = start()
        for state, draws in take_steps(rule, predict, state):  # noqa: B020 (the loop is left)
            assert len(draws) == 1 and torch.equal(draws[0].tokens, state.tokens)
            if state.step == k + 1:
                break
        rest = [later.tokens for later, _ in take_steps(rule, predict, pickle.loads(pickle.dumps(state)))]
        assert len(rest) == 4 - k
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[k + 1 :], strict=True))


def test_a_step_leaves_the_state_it_is_given_as_it_is():
    state = begin(torch.full((2, 24), 6), seed=torch.tensor([1, 2]), mask_token_id=6, num_inference_steps=4)
    before = pickle.dumps(state)
    rule = Rule(draw=Draw(differential=Differential(), momentum=0.5))
    logits = Logits(MODEL.predict_logits(state.tokens, None))
    after, _ = take_step(rule, logits, state)
    assert pickle.dumps(state) == before and after.num_draws == 1 and after.memory
    # so that a step may be taken again
    again, _ = take_step(rule, logits, state)
    assert torch.equal(again.tokens, after.tokens)


class TestRules:
    def test_the_settings_of_generate_are_those_of_maskgits_rule(self):
        settings = {"temperature": (3.0, 1.0), "token_temperature": 0.7, "noise_scale": 0.5, "mask_schedule": "linear"}
        rule = samplers.maskgit(**settings)
        assert torch.equal(sample(rule=rule).tokens, sample(**settings).tokens)
        assert torch.equal(sample(rule=Rule()).tokens, sample().tokens)

    def test_the_number_of_steps_is_the_rules_unless_told(self):
        steps = []
        for told in (None, 3):
            seen = []
            sample(rule=Rule(num_inference_steps=5), num_inference_steps=told, callback=seen.append)
            steps.append(len(seen))
        assert steps == [5, 3]

    def test_any_part_may_be_a_function_of_ones_own(self):
        order = torch.randperm(24, generator=torch.Generator().manual_seed(0))

        def score(sampled, state):
            return -order.float().expand_as(state.tokens)

        seen = []
        rule = Rule(score=score, select=MaskLowest(Ratio("linear"), 0.0))
        sample(rule=rule, num_inference_steps=6, callback=seen.append)
        for k, step in enumerate(seen):
            left = int(step.mask[0].sum())
            # a ratio in float32 may fall short of a whole token
            assert 0 <= 24 - 4 * (k + 1) - left <= 1
            assert set(step.mask[0].nonzero()[:, 0].tolist()) == set((order >= 24 - left).nonzero()[:, 0].tolist())

    def test_all_at_once(self):
        seen = []
        output = sample(rule=Rule(select=keep_all), num_inference_steps=4, callback=seen.append)
        assert not seen[0].mask.any() and (output.tokens < 6).all()

    def test_a_changed_rule_is_another(self):
        rule = Rule()
        assert rule.but(guidance_scale=2.0) != rule and rule.but() == rule
        with pytest.raises(AttributeError):
            rule.score = "margin"

    def test_statistics_are_asked_for_by_name(self):
        assert Rule().statistics == () and Rule(score="margin").statistics == ("margin",)
        assert samplers.path_planning().statistics == ("known_logprob",)

    @pytest.mark.parametrize(
        "change, error, message",
        [
            ({"score": "beauty"}, ValueError, r"^score: expected one of logprob, .* got 'beauty'"),
            ({"draw": 3}, TypeError, r"^draw: expected a function, got int"),
            ({"select": None}, TypeError, r"^select: expected a function, got NoneType"),
            ({"revisit": "often"}, TypeError, r"^revisit: expected a function, got str"),
            ({"guidance_scale": "sine:3"}, ValueError, r"^guidance_scale: expected .*'sine'"),
        ],
    )
    def test_bad_parts_are_named(self, change, error, message):
        with pytest.raises(error, match=message):
            Rule(**change)

    @pytest.mark.parametrize(
        "change, error, message",
        [
            ({"temperature": -1.0}, ValueError, r"^temperature: "),
            ({"noise_scale": [0.0, -1.0, 0.0]}, ValueError, r"^noise_scale: .* step 1"),
            ({"rows": "some"}, ValueError, r"^rows: expected 'masked' or 'all', got 'some'"),
            (
                {"rows": "all", "differential": Differential()},
                ValueError,
                r"^rows: expected 'masked' with differential",
            ),
            ({"top_k": 1.5}, ValueError, r"^top_k: expected an int, or a share in \(0, 1\], got 1.5"),
            ({"differential": 3}, TypeError, r"^differential: expected a Differential or None, got int"),
            ({"differential": Differential(), "top_k": 3}, ValueError, r"^differential: expected None with top_k"),
        ],
    )
    def test_bad_draws_are_named(self, change, error, message):
        with pytest.raises(error, match=message):
            Draw(**change)

    def test_what_is_told_twice_is_refused(self):
        with pytest.raises(ValueError, match=r"^noise_scale: expected none beside a rule"):
            sample(rule=Rule(), noise_scale=1.0)
        with pytest.raises(TypeError, match=r"^rule: expected a Rule or None, got dict"):
            sample(rule={})
        states = []
        sample(callback=lambda step: states.append(step.state))
        with pytest.raises(
            ValueError, match=r"^state: expected None with tokens, seed, num_samples or num_inference_steps"
        ):
            sample(state=states[0])
        with pytest.raises(ValueError, match=r"^state: expected None with tokens, seed"):
            generate(MODEL, state=states[0], seed=3)
        with pytest.raises(TypeError, match=r"^state: expected a State or None, got dict"):
            sample(state={})

    def test_values_of_another_number_of_steps(self):
        rule = Rule(draw=Draw(temperature=(1.0, 0.9, 0.8)))
        with pytest.raises(ValueError, match=r"^temperature: .* 7 values, one per step, got 3"):
            sample(rule=rule)

    def test_a_draw_without_logits_needs_a_memory_of_some(self):
        state = begin(torch.full((1, 24), 6), seed=torch.tensor([1]), mask_token_id=6, num_inference_steps=4)
        with pytest.raises(ValueError, match=r"^logits: expected the model's, got None"):
            take_step(Rule(), None, state)


def test_graphs_take_no_rule_that_they_do_not_know(monkeypatch):
    from mgt_sampler import sampling

    monkeypatch.setattr(sampling, "check_graphs", lambda device: None)
    with pytest.raises(ValueError, match=r"^cuda_graph: expected a rule of Draw and of MaskLowest"):
        sample(rule=samplers.entropy_bound(), cuda_graph=True)


def test_samples_that_are_done_early_need_fewer_calls():
    tokens = torch.full((2, 24), 6)
    tokens[1, 2:] = 3
    output = generate(MODEL, samplers.entropy_bound(0.5), tokens=tokens, progress=False)
    assert output.sample_calls[1] <= 2 < output.sample_calls[0] == output.model_calls
    plain = sample()
    assert plain.sample_calls.tolist() == [plain.model_calls] * 3
