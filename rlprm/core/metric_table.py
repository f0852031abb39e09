"""The one table of metric names: unit, formula, and how each reduces over micro-batches and ranks.

``{stream}`` a reward stream, ``{source}`` a data source, ``{metric}`` what a verifier measures, ``{n}`` a number,
``{stage}`` a stage of the driver, ``{role}`` a model role (policy, prm, critic, reference, rollout). Reduction:
mean (sum and count travel), sum, max, min; ``global`` is computed over all shards inside, equal on every rank;
``driver`` is known to the driver only. ``r(y)`` of an implicit PRM is the sum of its rewards; that of a discriminative one
is the mean over the steps that it could read, which is a chance of being right (range plus_minus: ``2 p - 1``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Reduction = Literal["mean", "sum", "max", "min", "global", "driver"]


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One line of the table."""

    name: str
    unit: str
    formula: str
    reduction: Reduction


def _family(prefix: str, reduction: Reduction, lines: str) -> tuple[MetricSpec, ...]:
    """``name | unit | formula`` per line; a line may end in ``| reduction`` where it differs from the family's."""
    specs = []
    for line in lines.strip().splitlines():
        name, unit, formula, *other = (field.strip() for field in line.split("|"))
        specs.append(MetricSpec(prefix + name, unit, formula, other[0] if other else reduction))  # type: ignore[arg-type]
    return tuple(specs)


PRM = """
    loss                    | nats | the PRM's loss on outcomes, global denominator           | sum
    pairs                   | 1    | right with a wrong response to one prompt, for pair losses | global
    shift                   | reward | what KTO's and BCO's losses measure rewards from       | global
    grad_norm               | 1    | 2-norm of the gradient before clipping                   | global
    lr                      | 1    | learning rate of the last update                         | global
    updates                 | 1    | optimizer steps taken in this step of the loop           | global
    label_mean              | 1    | their mean
    pair_acc_fresh          | 1    | right order within mixed groups, fresh and before learning
    pair_acc_fresh_no_last  | 1    | the same without each response's last step
    pair_acc_surprisal      | 1    | the same of the baseline log pi_ref
    auc_fresh               | 1    | AUC of r(y) against outcomes, fresh and before learning
    auc_fresh_no_last       | 1    | the same without each response's last step
    auc_surprisal           | 1    | the same of the baseline log pi_ref
    step_auc                | 1    | AUC of step rewards against exact step labels
    step_auc_surprisal      | 1    | the same of the baseline log pi_ref
    first_wrong_hit         | 1    | responses whose lowest step is the first wrong one
    first_wrong_hit_surprisal | 1  | the same of the baseline log pi_ref
    first_wrong_hit_chance  | 1    | the same of a blind guess: mean of 1 / steps
    mixed_groups            | 1    | fresh groups with right and wrong responses
    fresh_rows              | 1    | fresh responses measured
    ece                     | 1    | expected calibration error of sigmoid(r(y)); of a discriminative PRM: of its chance
    corr_with_outcome       | 1    | correlation of r(y) with the outcome
    kl_to_ref               | nats | mean of log pi_phi - log pi_ref on response tokens
    log_ratio_abs           | nats | mean abs(log pi_phi - log pi_ref) summed over a response
    trust                   | 1    | factor of the trust gate
    frac_steps_cut          | 1    | steps behind the length limit of a discriminative PRM    | mean
    frac_forged             | 1    | responses that hold control tokens of the PRM            | mean
    """

PROVER = """
    rollouts    | 1      | continuations sampled by a prover                        | sum
    tokens      | tokens | tokens of these continuations                            | sum
    frac_absent | 1      | continuations without a verdict                          | mean
    seconds     | s      | slowest rank's wall time for sampling and grading them   | max
    """

METRICS: tuple[MetricSpec, ...] = (
    *_family("actor/", "mean", """
        pg_loss           | 1    | aggregated policy loss, global denominators                  | sum
        kl_loss           | nats | aggregated KL penalty, before its weight                     | sum
        entropy           | nats | mean over response tokens of the entropy of the choice
        pg_clipfrac       | 1    | response tokens where the clipped branch decides
        pg_clipfrac_lower | 1    | response tokens where the dual clip decides
        ppo_kl            | nats | mean of log pi_old - log pi
        ratio             | 1    | mean of pi / pi_old
        ratio_max         | 1    | largest pi / pi_old                                          | max
        ratio_first_diff  | 1    | largest abs(pi / pi_old - 1) before the first update         | max
        grad_norm         | 1    | 2-norm of the whole gradient before clipping                 | global
        lr                | 1    | learning rate of the last update                             | global
        updates           | 1    | optimizer steps taken in this step of the loop               | global
        sequence_ratio    | 1    | GSPO: mean of the sequence's geometric mean ratio, over response tokens
        pg_damping        | 1    | SAPO: mean share of a token's gradient that the gate takes away
        trust_region_kl   | nats | mean log pi_old - log pi before an update, over the step's updates      | global
        trust_region_factor | 1  | price of that KL in the update's loss, over the step's updates          | global
        """),
    *_family("critic/", "mean", """
        vf_loss           | 1 | aggregated value loss, global denominators     | sum
        vf_clipfrac       | 1 | response tokens where the clipped branch decides
        vf_explained_var  | 1 | 1 - var(G - V) / var(G)                        | global
        grad_norm         | 1 | 2-norm of the gradient before clipping         | global
        lr                | 1 | learning rate of the last update               | global
        """),
    *_family("response_length/", "driver", """
        mean       | tokens | mean response length, EOS included
        max        | tokens | longest response
        min        | tokens | shortest response
        clip_ratio | 1      | responses cut by the length limit
        clip_ratio_right | 1 | right responses cut by the length limit, over right responses
        """),
    *_family("response_text/", "driver", """
        repetition_mean  | 1 | mean of 1 - distinct / all n-grams of 8 tokens in a response
        repetition_max   | 1 | the largest
        repetition_right | 1 | the mean over right responses
        copies           | 1 | responses equal to an earlier one of their group, token by token
        """),
    *_family("prompt_length/", "driver", """
        mean       | tokens | mean prompt length
        max        | tokens | longest prompt
        min        | tokens | shortest prompt
        """),
    *_family("process_steps/", "driver", """
        mean             | 1      | steps of reasoning per response
        max              | 1      | most steps in a response
        frac_single      | 1      | responses that are one step only: the splitter found nothing
        tokens           | tokens | response tokens per step, over all responses
        """),
    *_family("", "driver", """
        timing_s/{stage}                 | s   | wall time of the stage in this step
        perf/time_per_step               | s   | wall time of the step
        perf/total_num_tokens            | 1   | prompt and response tokens of the step
        perf/throughput                  | 1/s | total_num_tokens / time_per_step
        perf/max_memory_allocated_gb     | GB  | largest device memory in use, over ranks
        perf/cpu_memory_used_gb          | GB  | memory in use on the driver's host
        training/global_step             | 1   | steps of the loop so far
        training/rollouts_total          | 1   | responses sampled so far, filtered ones and a prover's continuations counted
        training/tokens_total            | 1   | response tokens of the batches so far
        training/nonfinite_metrics       | 1   | values of the step that were NaN or infinite (written as null)
        """),
    *_family("training/", "mean", """
        rollout_probs_diff_mean    | 1    | mean abs(pi_old - mu) on response tokens
        rollout_probs_diff_max     | 1    | largest abs(pi_old - mu)                    | max
        rollout_logprobs_diff_max  | nats | largest abs(log pi_old - log mu)            | max
        rollout_kl                 | nats | KL(mu, pi_old) by k1: mean log mu - log pi_old
        rollout_k3                 | nats | KL(mu, pi_old) by k3
        rollout_is_mean            | 1    | mean importance weight in use
        rollout_is_max             | 1    | largest importance weight in use            | max
        rollout_is_changed_frac    | 1    | tokens whose weight the correction truncated or dropped
        """),
    *_family("val-core/", "driver", """
        {source}/{metric}/mean@{n} | 1 | mean of the metric over n samples per prompt
        {source}/{metric}/pass@{n} | 1 | unbiased chance that one of n samples is right
        {source}/{metric}/greedy   | 1 | mean of the metric at temperature 0
        """),
    *_family("val-aux/", "driver", """
        {source}/num_prompts            | 1      | prompts evaluated
        {source}/num_too_long           | 1      | rows not evaluated because their prompt is too long
        {source}/num_without_gold       | 1      | rows not evaluated because they have no gold answer
        {source}/frac_absent            | 1      | responses without a verdict
        {source}/response_length/mean   | tokens | mean response length
        {source}/response_length/clip_ratio | 1  | responses cut by the length limit
        """),
    *_family("reward/{stream}/", "global", """
        mean          | reward | mean of present entries, before normalization
        std           | reward | their Bessel standard deviation
        min           | reward | the smallest
        max           | reward | the largest
        frac_present  | 1      | responses with a reward, over trained responses
        frac_zero_std | 1      | groups whose responses all earn the same sum, over groups with a reward
        frac_lone     | 1      | responses without a sibling to be compared with, over responses with a reward
        right_mean    | reward | mean sum of a right response's rewards, before any merge
        wrong_mean    | reward | the same of wrong responses
        right_wrong_gap   | reward | right_mean - wrong_mean
        corr_with_outcome | 1  | correlation of a response's sum with its outcome, before any merge
        """),
    *_family("adv/{stream}/", "global", """
        mean     | 1 | mean over trained response tokens, after whitening
        abs_mean | 1 | mean absolute value
        std      | 1 | Bessel standard deviation
        share    | 1 | cov(part, total) / var(total); the shares of all parts sum to 1
        """),
    *_family("prm/", "driver", PRM),
    *_family("prm/{stream}/", "driver", PRM),  # where a run has several process sources
    *_family("prover/", "driver", PROVER),
    *_family("prover/{stream}/", "driver", PROVER),  # where a run has several process sources
    *_family("rule/", "driver", """
        {stream}/frac_absent | 1 | responses on which the rule failed or ran out of time            | mean
        {stream}/frac_held   | 1 | mean outcome of the rule, of responses on which it gave one      | mean
        {stream}/seconds     | s | slowest rank's wall time for the rule                            | max
        """),
    *_family("flow/", "driver", """
        deviation      | 1 | debiased squared velocity error, mean over judged tokens   | mean
        frac_punished  | 1 | punished tokens, over paid ones                            | mean
        loss           | 1 | mean squared velocity error on right responses             | sum
        grad_norm      | 1 | 2-norm of the summed gradient                              | global
        updates        | 1 | optimizer steps of the flow network in this step           | global
        """),
    *_family("keep/", "driver", """
        rounds             | 1 | sampling rounds of the step
        prompts_sampled    | 1 | prompts sampled
        prompts_kept       | 1 | prompts accepted
        prompts_surplus    | 1 | accepted prompts beyond the batch, dropped
        frac_kept          | 1 | accepted over sampled prompts
        rollouts_sampled   | 1 | responses sampled, filtered ones and greedy baselines counted
        dropped_low        | 1 | prompts not kept whose mean outcome is below one half
        dropped_high       | 1 | prompts not kept whose mean outcome is at least one half
        dropped_unjudged   | 1 | prompts not kept because no response got a verdict
        aborted            | 1 | responses sampled again because the engine aborted one of their group
        outcome_mean_fresh | 1 | mean outcome of the first round, before filtering
        """),
    *_family("select/", "driver", """
        rows_in    | 1 | responses before the selection
        rows_out   | 1 | responses after it
        frac_kept  | 1 | rows_out / rows_in
        """),
    *_family("verifier/", "driver", """
        timeouts     | 1 | verdicts that ran out of time
        failures     | 1 | verdicts that failed otherwise
        frac_absent  | 1 | responses without a verdict
        canaries_failed | 1 | answers with a known outcome that the verifier judged otherwise
        """),
    *_family("alarm/", "driver", """
        brake   | 1 | factor on the weights of all process streams in the next step
        {name}  | 1 | 1 where the alarm is raised, 0 where it is not
        """),
    *_family("judge/{stream}/", "mean", """
        calls            | 1 | replies asked of the judge                                           | sum
        seconds          | s | wall time of judging, the slowest rank                               | max
        frac_failed      | 1 | calls without any reply: network, server, or too long to be asked
        frac_unparsed    | 1 | replies without a verdict that can be read, over replies
        frac_absent      | 1 | responses without any vote left, over judged responses
        disagreement     | 1 | largest minus smallest vote, mean over entries with two votes or more
        label_agreement  | 1 | judged steps whose verdict agrees with their exact label
        """),
    *_family("rollout/", "driver", """
        engines          | 1 | rollout engines that hold the weights of this step
        engines_lost     | 1 | rollout engines that were lost during the step
        engines_joined   | 1 | replacements that joined when the step's weights were sent
        engines_failed   | 1 | replacements that did not start
        resampled_groups | 1 | groups sampled again, with the same seeds, because of a lost engine
        resampled_for_sources | 1 | requests of process sources that another engine had to answer
        """),
    *_family("run/", "driver", """
        restarts         | 1 | times the run has started again by itself from a checkpoint, because something was lost
        """),
    *_family("staleness/", "driver", """
        mean | optimizer steps | policy version at training minus version that sampled
        max  | optimizer steps | the largest such gap
        """),
    *_family("weights/", "driver", """
        version                 | optimizer steps | version the engines hold
        bytes                   | B    | bytes sent to one engine
        """),
    *_family("sft/", "global", """
        loss       | nats | cross-entropy per response token   | sum
        grad_norm  | 1    | 2-norm of the gradient before clipping
        lr         | 1    | learning rate
        """),
    *_family("dpo/", "global", """
        loss           | nats | mean over pairs of weight times -log sigmoid(beta margin)       | sum
        margin         | nats | log-ratio of the preferred minus that of the other              | mean
        accuracy       | 1    | pairs whose margin is above 0, ties one half                    | mean
        preferred_log_ratio | nats | log pi - log pi_ref summed over the preferred's scored tokens | mean
        other_log_ratio     | nats | the same of the other                                      | mean
        weight         | 1    | mean weight of a pair                                           | mean
        grad_norm      | 1    | 2-norm of the gradient before clipping
        lr             | 1    | learning rate
        """),
    *_family("data/", "driver", """
        {source}/num_rows         | 1 | rows of the data source
        {source}/num_without_gold | 1 | rows left out because they have no gold answer
        {source}/num_too_long     | 1 | rows left out because their prompt is too long
        {source}/epoch            | 1 | passes through the source so far
        """),
)  # fmt: skip
