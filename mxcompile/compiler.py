"""The whole flow, from a model and a budget to a checked artifact."""

import json
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from torch import Tensor

from mxcompile import artifact as artifacts
from mxcompile import (
    cache_choice,
    caches,
    calibrate,
    graph,
    knobs,
    lower,
    memory,
    observe,
    passes,
    price,
    records,
    remote,
    report,
    roofline,
    runtime,
    strategies,
    target,
    tune,
    verify,
    written,
)
from mxcompile.activations import (
    AUTO,
    ActivationChoice,
    choose_activations,
    rounding_damage,
)
from mxcompile.artifact import Artifact
from mxcompile.budget import Budgets
from mxcompile.cache_choice import CacheChoice, choose_caches
from mxcompile.errors import PlanError, UnsupportedError, UsageError
from mxcompile.evidence import Evidence
from mxcompile.float_model import Feed, FloatModel
from mxcompile.formats import FORMATS, ActivationFormat
from mxcompile.instruments import Dump, Verify
from mxcompile.latency import Latency, predict
from mxcompile.passes import (
    center_vocabulary,
    scale_columns,
    smooth_attention,
    sort_neurons,
    sort_vocabulary,
)
from mxcompile.pipeline import Context, Instrument, Pipeline
from mxcompile.plan import CODEBOOK_BYTES, PrecisionPlan, Rule
from mxcompile.price import Costs
from mxcompile.progress import Progress
from mxcompile.records import Records
from mxcompile.samples import Samples, token_feeds
from mxcompile.solve import ANY_SPEED, Solution, solve, sweep
from mxcompile.statistics import Statistics
from mxcompile.survey import WIDE, survey

HEADER_BYTES: Final = 90
"""The most that the weight file's header says of a tensor, besides its name."""

TILE_ENTRY_BYTES: Final = 12
"""A row tile's entry in the table of formats and offsets."""

RUNTIME_SECONDS: Final = 1e-4
"""What the Python runtime spends on a decode step."""

SWEEP_POINTS: Final = 24


@dataclass(frozen=True, slots=True)
class Job:
    """A request, parsed once; the fields are the options of ``mxcompile MODEL``."""

    model: Path
    target: str
    budgets: tuple[str, ...]
    output: Path
    force: bool = False
    activations: ActivationChoice = AUTO
    caches: CacheChoice | None = None
    emit_onnx: Path | None = None
    dump_ir: Path | None = None
    calibration: Path | None = None
    sensitivity: calibrate.Sensitivity = calibrate.GRADIENT
    cache: Path | None = None
    plan: Path | None = None
    shapes: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    verify: Literal["quick", "full"] = "quick"
    strategy: str = strategies.OURS
    log: Path | None = None
    hardware: str | None = None


@dataclass(frozen=True, slots=True)
class Priced:
    """A float model in canonical form, and what plans for it are made from.

    Attributes:
        model: The model.
        samples: What it was run on.
        fixed_bytes: The part of the weight file that no plan changes.
        statistics: What calibration found.
        costs: Every tile's prices.
        codes: A folder for codes in the cache, if there is one.
    """

    model: ir.Model
    samples: Samples
    fixed_bytes: int
    statistics: Statistics
    costs: Costs
    codes: Path | None

    def evidence(self, progress: Progress) -> Evidence:
        """What strategies may ask of the model."""
        return Evidence(
            self.model,
            self.statistics,
            self.costs,
            self.samples.feeds,
            self.samples.probes,
            progress,
            self.codes,
        )


@dataclass(frozen=True, slots=True)
class Planned:
    """A float model in canonical form, with the plan for it and what the plan should cost.

    ``costs`` is None for a plan that was given, not made.
    """

    model: ir.Model
    samples: Samples
    plan: PrecisionPlan
    statistics: Statistics
    predicted: Mapping[str, float | str]
    costs: Costs | None = None


def compile_model(job: Job, progress: Progress) -> Artifact:
    """Compile a model under a budget; the artifact at ``job.output`` is complete or not there.

    Raises:
        MxError: what the user can mend; see ``mxcompile.errors``.
    """
    artifacts.check_destination(job.output, force=job.force)
    where = target.find(job.target)
    lower.check(where)
    _records(job)  # what is named and not there is refused before the work
    return _build(job, where, _plan(job, where, progress), progress)


def _build(job: Job, where: target.Target, planned: Planned, progress: Progress) -> Artifact:
    """Quantize, lower, package and verify what was planned."""
    ctx = Context(where, planned.plan, planned.statistics)
    with progress.stage("quantize"):
        quantized = _run(job, passes.QUANTIZE, planned.model, ctx)
    if job.emit_onnx is not None:
        with progress.stage("emit"):
            emit(quantized, job.emit_onnx)
    with progress.stage("lower"):
        fused = _run(job, passes.FUSE, quantized, ctx)
        lowered = lower.lower(fused, ctx, _knobs(job, where, progress))
    del quantized, fused
    memory.release()
    with tempfile.TemporaryDirectory(prefix="mxcompile-") as scratch:
        code = Path(scratch) / artifacts.CODE
        with progress.stage("build"):
            lower.build(lowered, where, code)
        with artifacts.staged(job.output, force=job.force) as folder:
            with progress.stage("package"):
                manifest = _manifest(job, where, planned, lowered)
                tokenizer = (job.model.parent / name for name in artifacts.TOKENIZER_FILES)
                built = artifacts.write(
                    folder,
                    manifest,
                    code=code,
                    weights=lowered.weights,
                    plan=planned.plan,
                    extra=[path for path in tokenizer if path.is_file()],
                )
            with progress.stage("verify"):
                if job.plan is None:
                    verify.check_size(built, Budgets.parse(job.budgets, manifest.parameters).size)
                quality = _verify(job, where, planned, built, progress)
            if job.verify == "full" and quality:
                verify.check_better(quality, _uniform_quality(job, where, planned, progress))
            page = report.render(
                built,
                quality=quality,
                predicted=planned.predicted,
                seconds=progress.seconds,
                costs=planned.costs,
                statistics=planned.statistics,
            )
            artifacts.finish(built, quality=quality, report=page)
    return artifacts.load(job.output)


def _records(job: Job) -> Records:
    """What is known of the machine that the program is for: this one, or another that is named.

    Raises:
        UsageError: nothing is known of the one that is named.
    """
    log = job.log or records.user_folder()
    found = records.load(log, job.hardware)
    if job.hardware is not None and not len(found):
        others = sorted({r.hardware for r in records.read(log / records.FILE)})
        raise UsageError(
            f"{log / records.FILE} has no records of '{job.hardware}' and these kernels; it has "
            f"some of {', '.join(map(repr, others)) or 'nothing'}"
        )
    return found


def _threads(job: Job, known: Records) -> int:
    """How many a program runs on: on a device that is named, as its records have it."""
    if job.hardware is None:
        return runtime.cores()
    return max(case.threads for case in known.cases())


def _knobs(job: Job, where: target.Target, progress: Progress) -> knobs.Choice:
    """What the machine's tuning records say; nothing for a machine that none is named for."""
    known = _records(job)
    if not len(known) or (job.hardware is None and not where.runs_here):
        return knobs.Choice()
    progress.note(f"{len(known)} tuning records of {known.hardware} choose the kernels' knobs")
    return knobs.choose(known, _threads(job, known))


def tune_model(
    model: Path,
    name: str,
    threads: int | None,
    limits: tune.Limits,
    log: Path,
    progress: Progress,
    tracker: remote.Tracker | None = None,
) -> list[tune.Outcome]:
    """Tune the kernels for the products of a model or an artifact; records go into ``log``.

    Args:
        model: An ONNX model or an artifact.
        name: A target's.
        threads: How many kernels run on; None for one a physical core.
        limits: When to stop.
        log: A folder.
        progress: Told about the stages.
        tracker: Where devices are asked for; None for this machine.

    Raises:
        UsageError: the machine cannot run the target's kernels, or they have no knobs.
        DeviceError: no device is there, or all were lost.
    """
    where, device = target.find(name), None
    if tracker is not None:
        tracker.devices()
        with progress.stage("connect"):
            device = remote.Device.connect(tracker, where.triple)
        where = target.find(name, device.machine)
        device.check(where)
    tune.check_knobs(where)
    with progress.stage("load"):
        if model.is_dir():
            shapes = tune.artifact_shapes(artifacts.load(model))
        else:
            loaded = Pipeline.parse(passes.FRONT, passes.REGISTRY).run(
                graph.load(model), Context(where), [Verify()]
            )
            shapes = tune.model_shapes(loaded)
    cores = runtime.cores() if device is None else device.machine.cores
    cases = tune.cases(shapes, threads or cores)
    found = []
    with progress.stage("tune", len(cases)) as advance:
        if tracker is None or device is None:
            tune.check_host(where)
            keep = partial(_keep, log)
            measurer = tune.SessionMeasurer.local(where)
            search = tune.tune(cases, measurer, records.load(log), limits, keep)
        else:
            search = remote.Fleet(tracker, where, log, progress).tune(cases, device, limits)
        for outcome in search:
            found.append(outcome)
            progress.note(str(outcome))
            advance()
    return found


def _keep(log: Path, record: records.Record) -> None:
    records.append(log, [record])


def _verify(
    job: Job, where: target.Target, planned: Planned, built: Artifact, progress: Progress
) -> Mapping[str, float]:
    """What is measured on the program; nothing where this machine cannot run it."""
    if not where.runs_here:
        progress.note(f"not verified on this host: it cannot run {where.name} programs")
        return {}
    return verify.check(built, job.model, planned.samples, planned.predicted)


def _uniform_quality(
    job: Job, where: target.Target, planned: Planned, progress: Progress
) -> Mapping[str, float]:
    """What is measured on the widest uniform plan that is no larger; nothing when none is."""
    plan = PrecisionPlan.widest_uniform(planned.plan.units, planned.plan.weight_bytes)
    if plan is None:
        return {}
    with tempfile.TemporaryDirectory(prefix="mxcompile-") as scratch:
        output = Path(scratch) / "uniform.mxc"
        other = replace(job, output=output, emit_onnx=None, dump_ir=None, verify="quick")
        uniform = replace(planned, plan=plan, predicted={})
        return _build(other, where, uniform, progress).manifest.quality


def plan_model(job: Job, progress: Progress) -> Planned:
    """What ``compile_model`` would compile."""
    return _plan(job, target.find(job.target), progress)


def price_model(job: Job, progress: Progress) -> Priced:
    """All that plans are made from, whatever the budget."""
    where = target.find(job.target)
    model, samples = _prepare(job, where, progress)
    kept = _kept(job, samples)
    model, statistics = _observed(job, where, model, samples, kept, progress)
    if not graph.units(model):  # only now: an operator that nobody supports is the better reason
        raise UnsupportedError(f"{job.model} has no weight that is large enough to plan")
    costs = _prices(job, model, statistics, kept, progress)
    codes = None if kept is None else Path(f"{kept}.codes-{price.VERSION}")
    return Priced(model, samples, _fixed_bytes(model), statistics, costs, codes)


def sweep_budgets(job: Job, progress: Progress) -> list[dict[str, float]]:
    """Bytes, bits a weight and predicted damage of the best plans from least to most bytes."""
    where = target.find(job.target)
    model, samples = _prepare(job, where, progress)
    kept = _kept(job, samples)
    model, statistics = _observed(job, where, model, samples, kept, progress)
    costs = _prices(job, model, statistics, kept, progress).bind(job.rules)
    count, fixed = graph.parameters(model), _fixed_bytes(model)
    return [
        {
            "weight_bytes": size + fixed,
            "bits_per_weight": 8 * (size + fixed) / count,
            "damage": damage,
        }
        for size, damage in sweep(costs, SWEEP_POINTS)
    ]


def emit(quantized: ir.Model, path: Path) -> None:
    """Write a model in standard ONNX, large weights beside it; whole or not at all."""
    standard = quantized.clone()
    common_passes.InlinePass()(standard)
    graph.prune(standard)
    common_passes.RemoveUnusedOpsetsPass()(standard)
    with tempfile.TemporaryDirectory(prefix=".emit-", dir=_folder(path)) as scratch:
        draft = Path(scratch) / path.name
        ir.save(standard, draft, external_data=f"{path.name}.data")
        for part in sorted(Path(scratch).iterdir(), reverse=True):
            part.replace(path.parent / part.name)


def _folder(path: Path) -> Path:
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder: {path} cannot be written")
    return folder


def _run(job: Job, pipeline: str, model: ir.Model, ctx: Context) -> ir.Model:
    watchers: list[Instrument] = [Verify()]
    if job.dump_ir is not None:
        done = len(list(job.dump_ir.glob("*.txt"))) if job.dump_ir.is_dir() else 0
        watchers.append(Dump(job.dump_ir, done))
    return Pipeline.parse(pipeline, passes.REGISTRY).run(model, ctx, watchers)


def _prepare(job: Job, where: target.Target, progress: Progress) -> tuple[ir.Model, Samples]:
    """The canonical model with smooth keys and values, and samples."""
    with progress.stage("load"):
        model = graph.load(job.model)
        graph.fix_shapes(model, dict(map(_parse_shape, job.shapes)))
        model = _run(job, passes.FRONT, model, Context(where))
        samples = Samples.find(model, job.model, job.calibration)
    if read := smooth_attention.observed(model):
        with progress.stage("smooth"):
            powers = observe.powers(model, samples.probes, read)
            model = _run(job, passes.SMOOTH, model, Context(where, powers=powers))
    return model, samples


def _parse_shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, sizes = text.rpartition("=")
    try:
        return name, tuple(int(size) for size in sizes.split(","))
    except ValueError as error:
        raise UsageError(f"'{text}' is not NAME=SIZE,SIZE,...") from error


def _fixed_bytes(model: ir.Model) -> int:
    """What the weight file holds besides packed tiles: other tensors, tile tables, its header."""
    units = graph.units(model)
    planned = {u.name for u in units}
    others = [
        (name, v.const_value)
        for name, v in model.graph.initializers.items()
        if name not in planned and v.const_value is not None
    ]
    others = [
        (n, t) for n, t in others if t.dtype == ir.DataType.FLOAT or t.size > lower.MAX_INLINE
    ]
    data = sum(tensor.nbytes for _, tensor in others)
    # A plan may take as many codebooks for each weight.
    codebooks = CODEBOOK_BYTES * sum(bool(fmt.codebook) for fmt in FORMATS.values())
    tables = sum(u.tiles * TILE_ENTRY_BYTES + codebooks for u in units)
    names = sum(len(name) + HEADER_BYTES for name, _ in others)
    return data + tables + names + sum(2 * (len(u.name) + HEADER_BYTES) for u in units)


def _kept(job: Job, samples: Samples) -> Path | None:
    """Where what is measured is kept, less the endings: a content hash in the cache, if any."""
    if job.cache is None:
        return None
    files = [p for p in (job.model, Path(f"{job.model}.data")) if p.is_file()]
    feeds = [*samples.feeds, *samples.probes]
    begin = None if samples.begin is None else [*samples.begin]
    settings = (job.sensitivity, begin, written.SEQUENCES, written.LENGTH)
    return job.cache / calibrate.cache_key(files, feeds, settings)


def _statistics(
    job: Job, model: ir.Model, samples: Samples, kept: Path | None, progress: Progress
) -> Statistics:
    """What the model does on the samples."""

    def collect(draft: calibrate.Draft | None = None) -> Statistics:
        return calibrate.collect(
            model,
            graph.uses(model),
            [*samples.feeds, *_written(model, samples, kept, progress)],
            samples.probes,
            sensitivity=job.sensitivity,
            progress=progress,
            draft=draft,
        )

    return collect() if kept is None else calibrate.cached(Path(f"{kept}.safetensors"), collect)


def _written(
    model: ir.Model, samples: Samples, kept: Path | None, progress: Progress
) -> list[Feed]:
    """What the model writes itself, where it is to."""
    if samples.begin is None:
        return []
    begin = samples.begin

    def write() -> Tensor:
        return written.write(FloatModel(model, graph.uses(model)), begin, progress)

    tokens = write() if kept is None else written.cached(Path(f"{kept}.written.safetensors"), write)
    memory.release()
    return token_feeds(model, tokens.numpy())


def _observed(
    job: Job,
    where: target.Target,
    model: ir.Model,
    samples: Samples,
    kept: Path | None,
    progress: Progress,
) -> tuple[ir.Model, Statistics]:
    """The model as it is planned and quantized, and what it does on the samples."""
    statistics = _statistics(job, model, samples, kept, progress)
    memory.release()
    for name in passes.ARRANGE.split(","):
        followed = _ARRANGED[name](model, statistics)
        model = _run(job, name, model, Context(where, statistics=statistics))
        statistics = followed
    return model, statistics


_ARRANGED: Final = {
    "scale-columns": scale_columns.follow,
    "center-vocabulary": center_vocabulary.follow,
    "sort-neurons": sort_neurons.follow,
    "sort-vocabulary": sort_vocabulary.follow,
}


def _prices(
    job: Job, model: ir.Model, statistics: Statistics, kept: Path | None, progress: Progress
) -> Costs:
    """What every tile costs in every format that it may get; kept beside the statistics."""
    units = graph.units(model)
    named = {rule.format for rule in job.rules}
    formats = [fmt for fmt in FORMATS.values() if fmt in price.PRICED or fmt in named]

    def make() -> Costs:
        weights = partial(graph.weight, model)
        return price.price(weights, units, statistics, formats, progress=progress)

    if kept is None:
        return make()
    path = Path(f"{kept}.costs-{price.VERSION}.safetensors")
    with suppress(UsageError):
        if (costs := price.load(path)).units == units and set(formats) <= set(costs.formats):
            return costs
    costs = make()
    price.save(costs, path)
    return costs


def _plan(job: Job, where: target.Target, progress: Progress) -> Planned:
    Budgets.parse(job.budgets, 1)  # a budget that cannot be read is refused before the work
    strategies.find(job.strategy)
    if job.plan is None:
        return _choose(job, where, price_model(job, progress), progress)
    model, samples = _prepare(job, where, progress)
    plan = _read_plan(job.plan, model)
    model, statistics = _observed(job, where, model, samples, _kept(job, samples), progress)
    if not plan.activations or job.activations != AUTO:
        plan = replace(plan, activations=choose_activations(model, statistics, job.activations))
    if not plan.caches or job.caches is not None:
        chosen = choose_caches(model, statistics, job.caches or cache_choice.DEFAULT)
        plan = replace(plan, caches=chosen)
    return Planned(model, samples, plan, statistics, {"source": str(job.plan)})


def _choose(job: Job, where: target.Target, priced: Priced, progress: Progress) -> Planned:
    """Spend the budgets by the strategy asked for; the solver's own refuses what none can meet."""
    model, costs = priced.model, priced.costs
    activations = choose_activations(model, priced.statistics, job.activations)
    found = _solve(job, where, priced, activations, progress)
    plan, predicted = found.plan, _predictions(found, model)
    if job.strategy != strategies.OURS:
        plan = _other(job, priced, progress)
        size = costs.size(plan) + priced.fixed_bytes
        bits = 8 * size / graph.parameters(model)
        damage = costs.total(plan)
        predicted = {"damage": damage, "method": job.strategy, "bits_per_weight": bits}
    plan = replace(
        plan,
        activations=activations,
        caches=choose_caches(model, priced.statistics, job.caches or cache_choice.DEFAULT),
    )
    if activations:
        predicted["activation_damage"] = rounding_damage(activations, priced.statistics)
    if plan.caches:
        predicted["cache_damage"] = cache_choice.damage(plan.caches, priced.statistics)
    return Planned(model, priced.samples, plan, priced.statistics, predicted, costs)


def _other(job: Job, priced: Priced, progress: Progress) -> PrecisionPlan:
    """The plan of a published strategy, which knows no other budget than a size."""
    count = graph.parameters(priced.model)
    budgets = Budgets.parse(job.budgets, count)
    if budgets.size is None or budgets.rate or budgets.divergence:
        raise UsageError(f"--strategy {job.strategy} takes a size, such as 4.2bit or 600MB")
    limit = budgets.size.limit(count) - priced.fixed_bytes
    return strategies.ruled(job.strategy, job.rules)(priced.evidence(progress), limit)


def _solve(
    job: Job,
    where: target.Target,
    priced: Priced,
    activations: Mapping[str, ActivationFormat],
    progress: Progress,
) -> Solution:
    count = graph.parameters(priced.model)
    budgets = Budgets.parse(job.budgets, count)
    with progress.stage("solve"):
        latency = ANY_SPEED
        if budgets.rate is not None:
            latency = _latency(job, where, priced.model, activations)
            progress.note(f"the rate is predicted by {latency.source}")
        return solve(
            priced.costs.bind(job.rules),
            budgets,
            parameters=count,
            fixed_bytes=priced.fixed_bytes,
            latency=latency,
        )


def _latency(
    job: Job,
    where: target.Target,
    model: ir.Model,
    activations: Mapping[str, ActivationFormat],
) -> Latency:
    """Measured where the target is this machine, else as records and its description say."""
    linear = {
        unit: [use for use in uses if use.kind != "embedding"]
        for unit, uses in graph.uses(model).items()
    }
    reads = {unit: len(uses) for unit, uses in linear.items()}
    if where.kernels == "cpu" and job.hardware is not None:
        known = _records(job)
        return predict(
            tune.products(model),
            reads,
            known,
            threads=_threads(job, known),
            bandwidth=where.speed.bytes_per_second,
            fixed_seconds=where.speed.step_seconds,
        )
    if where.runs_here and where.kernels == "cpu" and not where.parent:
        threads = runtime.cores()
        found = survey(where, threads, tune.main_columns(model))
        fixed = tune.kernel_calls(model) * found.call_seconds + RUNTIME_SECONDS
        fixed += tune.wide_results(model, WIDE) * found.element_seconds
        return predict(
            tune.products(model),
            reads,
            _records(job),
            threads=threads,
            bandwidth=roofline.measure(threads).read_bandwidth,
            fixed_seconds=fixed,
            survey=found,
            activations={
                unit: activations[source]
                for unit, uses in linear.items()
                for use in uses
                if use.node.inputs[0] is not None
                and (source := graph.name(use.node.inputs[0])) in activations
            },
        )
    macs = sum(reads[unit.name] * unit.parameters for unit in graph.units(model))
    return Latency.described(where, macs, reads)


def _predictions(found: Solution, model: ir.Model) -> dict[str, float | str]:
    predicted: dict[str, float | str] = {
        "damage": found.damage,
        "gap": found.gap,
        "method": found.method,
        "bits_per_weight": 8 * found.bytes / graph.parameters(model),
        "damage_per_byte": found.price,
    }
    return predicted if found.rate is None else {**predicted, "tokens_per_s": found.rate}


def _read_plan(path: Path, model: ir.Model) -> PrecisionPlan:
    try:
        plan = PrecisionPlan.from_json(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as a plan: {error}") from error
    if set(plan.units) != set(graph.units(model)):
        raise PlanError(f"{path} is a plan for another model")
    return plan


def _manifest(
    job: Job, where: target.Target, planned: Planned, lowered: lower.Lowered
) -> artifacts.Manifest:
    text = ",".join((passes.FRONT, passes.SMOOTH, passes.ARRANGE, passes.QUANTIZE, passes.FUSE))
    decoder = bool(lowered.caches)
    formats = planned.plan.caches
    kept = [(c, formats.get(c.name, caches.FLOAT).name) for c in caches.find(planned.model)]
    layers = tuple(
        artifacts.CacheLayer(cache.kv_heads, cache.head_dim, key, value)
        for (cache, key), (_, value) in zip(kept[::2], kept[1::2], strict=True)
    )
    return artifacts.Manifest(
        kind=artifacts.DECODER if decoder else artifacts.GRAPH,
        name=job.model.stem,
        target=where.name,
        target_features=tuple(sorted(where.requires)),
        budget=" ".join(job.budgets),
        activations=planned.plan.activation_summary,
        pipeline=text,
        plan_digest=planned.plan.digest,
        parameters=graph.parameters(planned.model),
        inputs=lowered.inputs,
        outputs=lowered.outputs,
        weights=tuple(lowered.weights),
        kv_cache=artifacts.KvCache(layers, lowered.caches) if decoder else None,
        generation=_generation(planned.model, lowered) if decoder else None,
    )


def _generation(model: ir.Model, lowered: lower.Lowered) -> artifacts.Generation:
    """What the exporter knew of the model's tokens, with safe values where it said nothing."""
    known: dict[str, Any] = json.loads(model.metadata_props.get("mxcompile.generation", "{}"))
    return artifacts.Generation(
        vocabulary=int(lowered.outputs[0].shape[-1]),
        max_position_embeddings=int(known.get("max_position_embeddings") or 4096),
        bos_token_id=known.get("bos_token_id"),
        eos_token_id=tuple(known.get("eos_token_id") or ()),
    )
