"""Self-speculative decoding (LayerSkip, Elhoushi et al. 2024): drafts, verified at full depth.

The first layers draft tokens, up to an exit whose head predicts the next one. Then the layers above
run once over the states of all drafted tokens, to verify them. Draft and verification are parts of
one pass of the model: they share the cache, and no layer runs twice for a token. If the last tokens
occurred earlier in the text, the tokens that followed them there are the draft instead (lookup.py),
and the whole model verifies them in one call.

A drafted token is accepted if it is the token that the whole model chooses. Where tokens are drawn,
the draft and the model draw the n-th token with the same random numbers (sampling.py), and every
token is a draw of the whole model. So for every seed the output is that of decoding without drafts,
and its distribution is the model's (Daliri, Musco and Suresh 2024, "drafter-invariant speculative
decoding"). This needs numbers of a token that do not depend on the tokens computed with it: see
promise.py.
"""

from time import perf_counter

import torch
from jaxtyping import Float
from torch import Tensor

from offramp.exits.confidence import ExitView, confidence_named
from offramp.exits.gate import FittedExits
from offramp.generation.config import GenerateConfig
from offramp.generation.exit_rule import broken_score
from offramp.generation.lookup import Lookup
from offramp.generation.payoff import Kind, Payoff, experience_of
from offramp.generation.sampling import Likeliest, Sampler, likeliest_with
from offramp.generation.transfer import on_device
from offramp.models.base import FEW_TOKENS, EarlyExitModel, Step
from offramp.models.kv_cache import KVCache
from offramp.models.router import RouterSpec
from offramp.models.work import Work

Chosen = tuple[int, int, float, Tensor]
"""A token, the layer where it left (or that drafted it), its confidence, and the logits (V,) of the
whole model from which it was chosen."""
Seen = tuple[Tensor, list[Likeliest], list[float]]
"""What the whole model says after each of some tokens: logits (T, V), the largest of them and its
token, and its probability."""


class SpeculativeDecoder:
    """Decodes one row, several tokens at a time.

    ``row`` is its row in a cache that has several. ``work`` counts what runs.
    """

    def __init__(
        self,
        model: EarlyExitModel,
        cache: KVCache,
        *,
        config: GenerateConfig,
        draft_exit: int,
        fitted: FittedExits,
        work: Work,
        row: int | None = None,
    ) -> None:
        self.model, self.cache, self.config = model, cache, config
        self.row = row
        self._rows = None if row is None else on_device([row], model.device)
        self.draft_exit, self.fitted = draft_exit, fitted
        self._layers = model.num_layers
        self.measure = confidence_named(config.draft_confidence)
        named = "draft_confidence draft_threshold temperature top_k top_p repetition_penalty"
        options = tuple(getattr(config, name) for name in named.split())
        self.payoff = Payoff(experience_of(model), drafts=(draft_exit, *options))
        self.lookup = Lookup(config.lookup)
        self.work = work
        self._router = model.router(cache, RouterSpec())
        self.drafted = self.accepted = self.length = 0

    def begin(self, prompt: list[int]) -> None:
        """Continue a prompt that is in the cache."""
        self.length = len(prompt)
        for earlier in prompt:
            self.lookup.push(earlier)

    @torch.inference_mode()
    def speculative_decode(
        self, token: int, sampler: Sampler, index: int, *, at_most: int
    ) -> list[Chosen]:
        """Draft, verify, and return the new tokens that this gives, the ``index``-th and later.

        ``token`` is the last token that was chosen. At most ``at_most`` tokens are returned.
        """
        began = perf_counter()
        self.lookup.push(token)
        found = self.lookup.drafts(self._most("lookup", at_most - 1))
        kind: Kind = "none"
        scores: list[float] = []
        if found and self._pays("lookup"):
            kind = "lookup"
            seen = self._whole([token, *found])
        elif at_most > 1 and self._pays("exit"):
            kind = "exit"
            most = self._most("exit", at_most - 1)
            states, found, scores = self._draft(token, sampler, index, most)
            seen = self._seen(self._run(torch.cat(states, dim=1), self.draft_exit, self._layers))
        else:
            found = []
            seen = self._whole([token])
        chosen = self._verify(seen, found, scores, sampler, index)
        self.length += len(chosen)
        self.cache.crop(self.length, row=self.row)
        for accepted, *_ in chosen[:-1]:
            self.lookup.push(accepted)
        self.drafted += len(found)
        self.accepted += len(chosen) - 1
        if self.config.adaptive:
            seconds = perf_counter() - began
            self.payoff.note(kind, drafts=len(found), tokens=len(chosen), seconds=seconds)
        return chosen

    def _whole(self, ids: list[int]) -> Seen:
        """Run the whole model for these tokens, the next ones of the text, in one call."""
        if self._router is None or len(ids) > FEW_TOKENS:
            return self._seen(self._run(self._embed(ids), 0, self._layers))
        rows, zeros = [self.row or 0] * len(ids), [0] * len(ids)
        positions = list(range(self.length, self.length + len(ids)))
        routed = self._router.step(ids, rows, positions, zeros, self.work)
        if routed.likeliest is None:
            return _seen_in(routed.logits)
        return routed.logits, routed.likeliest, routed.confidence

    def _seen(self, h: Float[Tensor, "1 T D"]) -> Seen:
        self.work.heads[self._layers, h.shape[1]] += 1
        return _seen_in(self.model.unembed(h, self._layers)[0])

    def _pays(self, kind: Kind) -> bool:
        return not self.config.adaptive or self.payoff.pays(kind)

    def _most(self, kind: Kind, left: int) -> int:
        """Return how many drafts a round may have; ``left`` tokens are left to draft."""
        most = min(self.config.max_drafts, left)
        return self.payoff.drafts(kind, most) if self.config.adaptive else most

    def _draft(
        self, token: int, sampler: Sampler, index: int, at_most: int
    ) -> tuple[list[Tensor], list[int], list[float]]:
        """Draft tokens until the confidence falls below the threshold.

        Returns the states (1, 1, D) at the exit of ``token`` and of each draft, the drafts, and
        the confidence of each.
        """
        states = [self._run(self._embed([token]), 0, self.draft_exit)]
        drafts: list[int] = []
        scores: list[float] = []
        vocab = self.fitted.draft_vocab
        while len(drafts) < at_most:
            logits = self.model.unembed(states[-1], self.draft_exit, vocab=vocab)[0, 0]
            confidence = self._confidence(logits, states[-1][0, 0])
            [likeliest], [[score]] = likeliest_with(logits[None], confidence[None], vocab=vocab)
            if score != score:
                raise broken_score(self.config.draft_confidence, self.draft_exit)
            self.work.drafts[self.draft_exit, 1] += 1
            if not score >= self.config.draft_threshold:
                break
            place = index + len(drafts)
            drafts.append(
                sampler.choose(logits, place, after=drafts, vocab=vocab, likeliest=likeliest)
            )
            scores.append(score)
            ahead = self._embed(drafts[-1:], ahead=len(drafts))
            states.append(self._run(ahead, 0, self.draft_exit, ahead=len(drafts)))
        return states, drafts, scores

    def _confidence(self, logits: Float[Tensor, " W"], state: Float[Tensor, " D"]) -> Tensor:
        view = ExitView(exit_layer=self.draft_exit, logits=logits, state=state, fitted=self.fitted)
        return self.measure.score(view)

    def _embed(self, ids: list[int], *, ahead: int = 0) -> Float[Tensor, "1 T D"]:
        step = self._step(ahead, len(ids))
        return self.model.embed(on_device([ids], self.model.device), step=step)

    def _run(
        self, h: Float[Tensor, "1 T D"], start: int, stop: int, *, ahead: int = 0
    ) -> Float[Tensor, "1 T D"]:
        """Run blocks for tokens of which the first is ``ahead`` positions after the last token."""
        self.work.blocks[h.shape[1]] += stop - start
        return self.model.run_layers(h, start, stop, step=self._step(ahead, h.shape[1]))

    def _step(self, ahead: int, tokens: int) -> Step:
        first = self.length + ahead
        positions = torch.arange(first, first + tokens, device=self.model.device)[None]
        end = first + tokens
        return Step(positions=positions, cache=self.cache, rows=self._rows, end=end)

    def _verify(
        self,
        seen: Seen,
        drafts: list[int],
        scores: list[float],
        sampler: Sampler,
        index: int,
    ) -> list[Chosen]:
        """Accept drafts up to the first that the whole model does not choose; add its choice."""
        logits, likeliest, largest = seen
        chosen: list[Chosen] = []
        for n, draft in enumerate(drafts):
            token = sampler.choose(logits[n], index + n, after=drafts[:n], likeliest=likeliest[n])
            if token != draft:
                return [*chosen, (token, self._layers, largest[n], logits[n])]
            from_exit = bool(scores)
            layer = self.draft_exit if from_exit else self._layers
            chosen.append((token, layer, scores[n] if from_exit else largest[n], logits[n]))
        n = len(drafts)
        token = sampler.choose(logits[n], index + n, after=drafts, likeliest=likeliest[n])
        return [*chosen, (token, self._layers, largest[n], logits[n])]


def _seen_in(logits: Float[Tensor, "T V"]) -> Seen:
    largest = logits.float().softmax(dim=-1).amax(dim=-1)
    likeliest, [numbers] = likeliest_with(logits, largest)
    return logits, likeliest, numbers
