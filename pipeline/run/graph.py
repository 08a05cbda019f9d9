"""Graph: the bounded pipeline, run again and again.

Beam's FnApiRunner makes everything anew in each run: it fuses the graph, starts a worker, and
builds a processor for each stage. That is most of what a small round costs. Here all of it lives as
long as the graph; what a round leaves behind, in buffers, watermarks and state, is cleared before
the next (docs/adr/0023-a-kept-graph.md). This reaches into one minor version of Beam. Where that
looks different, the plain runner does the same, only slower.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable
from typing import Any

import apache_beam as beam
from apache_beam.metrics.cells import CounterCell
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability import common_urns
from apache_beam.portability.api import beam_fn_api_pb2, beam_runner_api_pb2
from apache_beam.runners.portability.fn_api_runner import execution, worker_handlers
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from apache_beam.runners.worker import bundle_processor, statesampler
from apache_beam.runners.worker.data_plane import ClosableOutputStream
from apache_beam.transforms.environments import EmbeddedPythonEnvironment
from apache_beam.utils.timestamp import MIN_TIMESTAMP

from transforms.errors import from_runner

_LOGGER = logging.getLogger(__name__)

# The state is in this process already. To cache it there a second time only costs: the cache weighs
# each value it takes by going through the globals of all modules, a millisecond a time.
worker_handlers.STATE_CACHE_SIZE_MB = 0

# The version of Beam whose inside `_KeptRunner` knows.
_KNOWN = "2.77."
# What steps may ask of it. Not to be split, nor to be told when a bundle is final.
_REQUIREMENTS = {common_urns.requirements.REQUIRES_STATEFUL_PROCESSING.urn}

# What a worker answers to a bundle that was run to its end.
_NOTHING_LEFT = beam_fn_api_pb2.InstructionResponse()


class Graph:
    """The bounded pipeline; each `run` is a round.

    The steps' `setup` runs before the first round, `teardown` at `close`. State, timers and
    watermarks are a round's own. After a round that failed everything is made anew.

    Args:
        wire: Puts the steps into a pipeline.
        keep: Whether to keep what a round needs for the next one.
    """

    def __init__(self, wire: Callable[[beam.Pipeline], Any], keep: bool = True) -> None:
        self._options = PipelineOptions([])
        pipeline = beam.Pipeline(runner=FnApiRunner(), options=self._options)
        wire(pipeline)
        # Translated once: building and translating costs twice what running an empty round does.
        self._translated = pipeline.to_runner_api(
            default_environment=EmbeddedPythonEnvironment.default()
        )
        # Beam makes a folder for files that other languages' steps need, and leaves it behind.
        shutil.rmtree(pipeline.local_tempdir, ignore_errors=True)
        self._keep = keep
        self._kept: _KeptRunner | None = None

    @property
    def is_kept(self) -> bool:
        """Whether the next round runs on what the last one left."""
        return self._kept is not None

    def run(self) -> Counter[str]:
        """Run one round.

        Returns:
            What the steps' counters counted in it, by `namespace.name`.

        Raises:
            SinkError: A step failed.
        """
        try:
            kept = self._kept = self._kept or self._make()
            return kept.run_round() if kept else self._run_plain()
        except Exception as error:
            self.close()
            raise from_runner(error) from None

    def close(self) -> None:
        """Let go of what is kept; another `run` makes it anew."""
        kept, self._kept = self._kept, None
        if kept:
            kept.close()

    def _make(self) -> _KeptRunner | None:
        if not self._keep:
            return None
        try:
            if not beam.__version__.startswith(_KNOWN):
                raise RuntimeError(f"apache-beam {beam.__version__} is not {_KNOWN}x")
            return _KeptRunner(self._translated)
        except Exception as error:
            self._keep = False
            _LOGGER.warning("rounds take longer than they have to: %s", error)
            return None

    def _run_plain(self) -> Counter[str]:
        result = FnApiRunner().run_via_runner_api(self._translated, self._options)
        result.wait_until_finish()
        counted: Counter[str] = Counter()
        for counter in result.metrics().query()["counters"]:
            name = f"{counter.key.metric.namespace}.{counter.key.metric.name}"
            counted[name] += counter.committed or 0
        return counted


class _KeptRunner(FnApiRunner):
    """The FnApiRunner with one graph: its stages, its worker, its stages' processors.

    `run_round` is `FnApiRunner.run_stages` without what that makes first and closes at the end.

    Args:
        translated: The pipeline; its only environment is this process.
    """

    def __init__(self, translated: beam_runner_api_pb2.Pipeline) -> None:
        super().__init__()
        components, stages = self.create_stages(self.resolve_any_environments(translated))
        self._workers = worker_handlers.WorkerHandlerManager(
            components.components.environments, self._provision_info
        )
        self._counted: Counter[str] = Counter()
        self._bundles: dict[str, _Bundles] = {}
        unknown = set(translated.requirements) - _REQUIREMENTS
        assert not unknown, f"steps require {', '.join(sorted(unknown))}"
        try:
            self._context = execution.FnApiRunnerExecutionContext(
                stages,
                self._workers,
                components.components,
                components.safe_coders,
                components.data_channel_coders,
                num_workers=1,
                split_managers=(),
            )
            self._context.setup()
            self._first = self._take_first_inputs()
            for stage in stages:
                handlers: list[Any] = self._context.bundle_manager_for(stage).worker_handlers
                for handler in handlers:
                    self._adopt(handler.bundle_processor_cache)
        except BaseException:
            self.close()
            raise

    def run_round(self) -> Counter[str]:
        """One round; what it counted."""
        self._reset()
        context = self._context
        ready = context.queues.ready_inputs
        while len(ready):
            name, data = ready.deque()
            self._execute_bundle(context, context.bundle_manager_for(context.stages[name]), data)
            if not len(ready):
                self._schedule_ready_bundles(context)
        left = context.queues.watermark_pending_inputs, context.queues.time_pending_inputs
        assert not any(map(len, left)), "a round has ended with bundles that did not run"
        counted = self._counted.copy()
        self._counted.clear()
        return counted

    def close(self) -> None:
        self._workers.close_all()

    def _take_first_inputs(self) -> list[tuple[str, list[tuple[str, Any]]]]:
        """What every round begins with: the impulses of each stage that has some, with coders."""
        first, ready = [], self._context.queues.ready_inputs
        while len(ready):
            name, inputs = ready.deque()
            buffers: dict[str, Any] = dict(inputs.data)
            first.append((name, [(pcoll, each._coder_impl) for pcoll, each in buffers.items()]))
        assert first and not len(self._context.queues.watermark_pending_inputs)
        return first

    def _reset(self) -> None:
        """Clear what is a round's, and begin the next."""
        context = self._context
        context.pcoll_buffers, context.timer_buffers = {}, {}
        for node in context.watermark_manager._pcollections_by_name.values():
            node._watermark = node._produced_watermark = MIN_TIMESTAMP
            node._fully_consumed_by = 0
        state: Any = context.state_servicer._state
        state.clear()
        for name, inputs in self._first:
            data: dict[str, execution.PartitionableBuffer] = {}
            for pcoll, coder in inputs:
                buffer = data[pcoll] = execution.ListBuffer(coder)
                buffer.append(execution.ENCODED_IMPULSE_VALUE)
            context.queues.ready_inputs.enque((name, execution.DataInput(data, {})))

    def _adopt(self, cache: Any) -> None:
        """Have a worker keep what it made: what nothing has happened in for a minute it would let
        go of."""
        cache.periodic_shutdown.cancel()

    def _get_bundle_manager(self, bundle_context_manager: Any) -> Any:
        name = bundle_context_manager.stage.name
        if name not in self._bundles:
            self._bundles[name] = _Bundles(bundle_context_manager, self._counted)
        return self._bundles[name]


class _Bundles:
    """The bundles of one stage, run where they are.

    Beam's BundleManager sends a bundle's input to a worker, with a thread that asks how far it is,
    and the worker describes some dozens of metrics in its answer. Here the input goes straight into
    the stage's steps and what they put out straight into its buffers, and of the metrics the steps'
    counters are read.

    Args:
        stage: The stage; its descriptor is known to its worker.
        counted: Takes what the steps' counters count.
    """

    def __init__(self, stage: Any, counted: Counter[str]) -> None:
        self._stage = stage
        self._counted = counted
        descriptor, worker = stage.process_bundle_descriptor, stage.worker_handlers[0]
        # Never given back; the worker shuts it down when it is closed itself.
        self._processor = worker.bundle_processor_cache.get(descriptor.id, descriptor.id)
        self._context = bundle_processor.ExecutionContext(instruction_id=descriptor.id)
        self._steps = list(self._processor.ops.values())
        for (step, family), timer in self._processor.timers_info.items():
            self._processor.ops[step].add_timer_info(family, timer)

    def process_bundle(
        self, inputs: Any, outputs: Any, fired: Any, timers: Any, dry_run: bool = False
    ) -> tuple[beam_fn_api_pb2.InstructionResponse, list[Any]]:
        """Run one bundle, like `BundleManager.process_bundle`."""
        processor, ops = self._processor, self._processor.ops
        # Steps find their counters by it. It is not started: it would sample which step is running.
        statesampler.set_current_tracker(processor.state_sampler)
        try:
            with processor.state_handler.process_instruction_id(self._context.instruction_id, ()):
                for step, buffer in outputs.items():
                    ops[step].set_output_stream(self._stream(buffer, step))
                streams = []
                for (step, family), info in processor.timers_info.items():
                    info.output_stream = self._stream(timers[step, family][0], step)
                    streams.append(info.output_stream)
                for op in reversed(self._steps):
                    op.execution_context = self._context
                    op.start()
                for (step, family), buffer in fired.items():
                    coder = processor.timers_info[step, family].timer_coder_impl
                    for encoded in buffer:
                        for timer in coder.decode_all(encoded):
                            ops[step].process_timer(family, timer)
                for step, buffer in inputs.items():
                    for encoded in buffer:
                        ops[step].process_encoded(encoded)
                for op in self._steps:
                    op.finish()
                for stream in streams:
                    stream.close()
        finally:
            statesampler.set_current_tracker(None)
        for op in self._steps:
            _add(self._counted, op.metrics_container)
            op.reset()
        return _NOTHING_LEFT, []

    def _stream(self, buffer_id: bytes, step: str) -> Any:
        """Puts out into a buffer of the round's, made once there is something for it."""

        def put(encoded: bytes) -> None:
            if encoded:
                buffer: Any = self._stage.get_buffer(buffer_id, step)
                if buffer.cleared:
                    buffer.reset()
                buffer.append(encoded)

        return ClosableOutputStream.create(put, put, 0)


def _add(counted: Counter[str], container: Any) -> None:
    for key, cell in container.metrics.items():
        if type(cell) is CounterCell and cell.value:
            counted[f"{key.metric_name.namespace}.{key.metric_name.name}"] += cell.value
