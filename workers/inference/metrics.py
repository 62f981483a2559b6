"""Prometheus metrics under vLLM's names, so that dashboards made for it work. Intervals by the monotonic clock."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

LABELS = ("model_name",)
LATENCY_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)


class Metrics:
    """The metrics of one process, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.running = self._gauge("vllm:num_requests_running", "requests that load or generate now")
        self.waiting = self._gauge("vllm:num_requests_waiting", "requests that wait for their turn")
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "tokens read")
        self.generation_tokens = self._counter("vllm:generation_tokens", "tokens written")
        self.success = Counter(
            "vllm:request_success",
            "requests that ended, by finished_reason: stop, length, abort (client gone) or error",
            (*LABELS, "finished_reason"),
            registry=self.registry,
        )
        self.queue_time = self._histogram("vllm:request_queue_time_seconds", "from arrival to turn", LATENCY_BUCKETS)
        self.first_token = self._histogram(
            "vllm:time_to_first_token_seconds", "from arrival to first token", LATENCY_BUCKETS
        )
        self.inter_token = self._histogram("vllm:inter_token_latency_seconds", "between two tokens", TOKEN_BUCKETS)
        self.end_to_end = self._histogram(
            "vllm:e2e_request_latency_seconds", "from arrival to last token", LATENCY_BUCKETS
        )
        self.models_loaded = Gauge("modepress_models_loaded", "models in memory", registry=self.registry)
        self.models_bytes = Gauge("modepress_models_bytes", "bytes of models in memory", registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, LABELS, registry=self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, LABELS, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, LABELS, registry=self.registry, buckets=buckets)


class RequestMeter:
    """Measures one request of a known model, from arrival to end."""

    def __init__(self, metrics: Metrics, model_name: str) -> None:
        self._metrics = metrics
        self._name = model_name
        self._arrived = time.monotonic()
        self._last_token: float | None = None
        self._gauge: Gauge | None = None

    def waiting(self) -> None:
        """The request has a place in the line."""
        self._move(self._metrics.waiting)

    def running(self) -> None:
        """The request has its turn."""
        self._move(self._metrics.running)
        self._metrics.queue_time.labels(self._name).observe(time.monotonic() - self._arrived)

    def prompt(self, tokens: int) -> None:
        """The prompt is known."""
        self._metrics.prompt_tokens.labels(self._name).inc(tokens)

    def token(self) -> None:
        """One more token is there."""
        now = time.monotonic()
        if self._last_token is None:
            self._metrics.first_token.labels(self._name).observe(now - self._arrived)
        else:
            self._metrics.inter_token.labels(self._name).observe(now - self._last_token)
        self._last_token = now
        self._metrics.generation_tokens.labels(self._name).inc()

    def ended(self, reason: str) -> None:
        """The request is over: stop, length, abort or error."""
        self._move(None)
        self._metrics.success.labels(self._name, reason).inc()
        if reason in ("stop", "length"):
            self._metrics.end_to_end.labels(self._name).observe(time.monotonic() - self._arrived)

    def _move(self, gauge: Gauge | None) -> None:
        if self._gauge is not None:
            self._gauge.labels(self._name).dec()
        if gauge is not None:
            gauge.labels(self._name).inc()
        self._gauge = gauge
