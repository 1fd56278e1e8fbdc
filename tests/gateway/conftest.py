"""A real server on a loopback port over a scripted replica, a tiny trained tokenizer and in-memory collaborators."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import openai
import pytest
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from rekindle.errors import AdapterRejected, InvalidRequest, NotFound, RekindleError
from rekindle.gateway.app import create_app
from rekindle.gateway.seams import ServedBase, Services
from rekindle.gateway.settings import GatewaySettings
from rekindle.protocol.adapters import AdapterManifest, LoraBinding
from rekindle.protocol.estimates import StageEstimate
from rekindle.protocol.generation import FinishReason, GenerateRequest, TokenChunk, TokenLogprobs
from rekindle.protocol.identity import AdapterDigest, ModelDigest
from rekindle.protocol.models import ModelManifest
from rekindle.protocol.replica import EngineReady, EngineStats, PoolBytes
from rekindle.protocol.tiers import Snapshot

CONTEXT_TOKENS = 512
BASE_NAME = "org/tiny:v1"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = ["the quick brown fox jumps over the lazy dog, said the user to the assistant", "größe 日本 naïve café 🙂"]


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer of a few hundred tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    return train_tokenizer()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tiny_tokenizer.save(str(directory / "tokenizer.json"))
    eos = tiny_tokenizer.token_to_id("<|im_end|>")
    (directory / "config.json").write_text(json.dumps({"bos_token_id": eos, "eos_token_id": eos}))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    (directory / "generation_config.json").write_text(json.dumps({"top_p": 0.9, "eos_token_id": [eos]}))
    return directory


@pytest.fixture(scope="session")
def base_manifest(tiny_tokenizer: Tokenizer) -> ModelManifest:
    return ModelManifest(
        digest=ModelDigest("ba5e" * 16),
        family="llama",
        dtype="F32",
        num_parameters=1,
        num_bytes=4,
        num_layers=1,
        vocab_size=tiny_tokenizer.get_vocab_size(),
        context_length=CONTEXT_TOKENS,
        eos_token_ids=(tiny_tokenizer.token_to_id("<|im_end|>"),),
        tied_embeddings=True,
        modules=(),
    )


class ScriptedReplica:
    """Answers every request with `answer(request)`, `chunk_tokens` at a time, and records what it was told.

    With `hold_after` set, each sequence waits after that many tokens until `release` is called.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.adapters: dict[AdapterDigest, Path] = {}
        self.removed: list[AdapterDigest] = []
        self.is_ready = True
        self.restarts_total = 2
        self.wakes_total = 3
        self.last_start_s = (("process", 0.25), ("weights", 0.5))
        self.start_estimates = (StageEstimate("start:process", 0.25, None, 1, 0.75),)
        self.ready = EngineReady(100, 4096, 16, CONTEXT_TOKENS, ())
        self.stats: EngineStats | None = EngineStats(
            num_waiting=2, num_running=3, pages_total=100, pages_free=40, pages_kv_in_use=25, pages_adapter=20,
            pages_prefix_cache=15, pool_bytes=PoolBytes(1, 2, 3, 4, 5, 6, 7, 8, 9), resident_adapters=(),
            num_adapter_loads=1, prompt_tokens_total=0, generated_tokens_total=0, prefix_queries_total=70,
            prefix_hits_total=30, preemptions_total=5, adapter_loads_total=6, adapter_load_s_total=0.5,
            adapter_evictions_total=8, prefix_evictions_total=9, refused_late_total=10, refused_full_total=11,
            steps_total=7, merged_adapter=AdapterDigest("merged-version"), steps_merged_total=4,
            adapter_queued_s_total=0.125, load_estimates=(StageEstimate("disk->device", 0.5, 1e9, 12, 0.0625),),
        )  # fmt: skip
        self._loop: asyncio.AbstractEventLoop | None = None
        self.reset()

    def reset(self) -> None:
        self.requests: list[GenerateRequest] = []
        self.aborted: list[str] = []
        self.active: set[str] = set()
        self.refusal: Exception | None = None
        self.failure_after: tuple[int, Exception] | None = None
        self.adapter_refusal: Exception | None = None
        self.answer: Callable[[GenerateRequest], Sequence[int]] = lambda _: self.encode("the quick brown fox")
        self.chunk_tokens = 1
        self.cached_tokens = 0
        self.hold_after: int | None = None
        self.num_yielded = 0
        self._released = asyncio.Event()

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def say(self, text: str) -> None:
        self.answer = lambda _: self.encode(text)

    def release(self) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._released.set)

    async def add_adapter(self, manifest: AdapterManifest, path: Path) -> None:
        if self.adapter_refusal is not None:
            raise self.adapter_refusal
        self.adapters[manifest.digest] = path

    async def remove_adapter(self, digest: AdapterDigest) -> None:
        self.adapters.pop(digest, None)
        self.removed.append(digest)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        self._loop = asyncio.get_running_loop()
        self.requests.append(request)
        if self.refusal is not None:
            raise self.refusal
        if request.adapter is not None and request.adapter not in self.adapters:
            raise InvalidRequest("the replica does not know this adapter")
        self.active.add(request.request_id)
        try:
            async for chunk in self._chunks(request):
                self.num_yielded += 1
                yield chunk
        except GeneratorExit:
            self.aborted.append(request.request_id)
            raise
        except asyncio.CancelledError:
            self.aborted.append(request.request_id)
            raise
        finally:
            self.active.discard(request.request_id)

    async def _chunks(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        sampling = request.sampling
        ids, finish = list(self.answer(request))[: sampling.max_tokens], FinishReason.LENGTH
        stop = next((place for place, token in enumerate(ids) if token in sampling.stop_token_ids), None)
        if stop is not None:
            ids, finish = ids[: stop + 1], FinishReason.STOP
        elif len(ids) < sampling.max_tokens and sampling.stop_token_ids:
            ids, finish = [*ids, sampling.stop_token_ids[-1]], FinishReason.STOP
        pieces = [ids[at : at + self.chunk_tokens] for at in range(0, len(ids), self.chunk_tokens)] or [[]]
        offset = 0
        for place, piece in enumerate(pieces):
            if self.hold_after is not None and offset >= self.hold_after:
                await self._released.wait()
            if self.failure_after is not None and offset >= self.failure_after[0]:
                raise self.failure_after[1]
            await asyncio.sleep(0)
            first, last = place == 0, place == len(pieces) - 1
            yield TokenChunk(
                request_id=request.request_id,
                epoch=0,
                offset=offset,
                token_ids=tuple(piece),
                finish_reason=finish if last else None,
                logprobs=None if sampling.logprobs is None else tuple(_scores(t, sampling.logprobs) for t in piece),
                prompt_logprobs=_prompt_scores(request) if first else None,
                cached_tokens=self.cached_tokens if first else None,
            )
            offset += len(piece)


def _scores(token_id: int, num_top: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, -0.5, tuple((token_id + place, -0.5 - place) for place in range(num_top)))


def _prompt_scores(request: GenerateRequest) -> tuple[TokenLogprobs | None, ...] | None:
    num_top = request.sampling.prompt_logprobs
    if num_top is None:
        return None
    return (None, *(_scores(token_id, num_top) for token_id in request.prompt_token_ids[1:]))


@dataclass(frozen=True, slots=True)
class FakeAdapter:
    name: str
    base_name: str
    manifest: AdapterManifest
    path: Path
    created_s: int = 1_700_000_000


@dataclass(frozen=True, slots=True)
class FakeName:
    name: str
    base: ModelDigest
    created_s: int


@dataclass(frozen=True, slots=True)
class FakeResolution:
    base_digest: ModelDigest
    adapter: FakeAdapter | None


@dataclass
class MemoryCatalog:
    """Names in a dictionary."""

    bases: dict[str, ModelDigest]
    by_name: dict[str, FakeAdapter] = field(default_factory=dict)
    refusal: RekindleError | None = None

    def resolve(self, model: str) -> FakeResolution:
        if model in self.bases:
            return FakeResolution(self.bases[model], None)
        names = [name for name in self.by_name if model in (name, f"{self.by_name[name].base_name}:{name}")]
        if not names:
            raise NotFound(f"no model {model!r}")
        adapter = self.by_name[names[0]]
        return FakeResolution(self.bases[adapter.base_name], adapter)

    def adapter_names(self, bases: Collection[ModelDigest]) -> list[FakeName]:
        served = [adapter for _, adapter in sorted(self.by_name.items()) if adapter.manifest.base in bases]
        return [FakeName(adapter.name, adapter.manifest.base, adapter.created_s) for adapter in served]

    def adapter_page(self, bases: Collection[ModelDigest], after: str | None, limit: int) -> list[FakeAdapter]:
        names = [adapter.name for adapter in self.adapter_names(bases) if after is None or adapter.name > after]
        return [self.by_name[name] for name in names[:limit]]

    def is_named(self, digest: AdapterDigest) -> bool:
        return any(adapter.manifest.digest == digest for adapter in self.by_name.values())

    def adapter(self, name: str) -> FakeAdapter:
        if name not in self.by_name:
            raise NotFound(f"no adapter is named {name!r}", field="name", code="adapter_not_found")
        return self.by_name[name]

    def register_adapter(self, name: str, base_name: str, manifest: AdapterManifest, source: Path) -> FakeAdapter:
        if self.refusal is not None:
            raise self.refusal
        self.by_name[name] = FakeAdapter(name, base_name, manifest, source / "adapter.txt")
        return self.by_name[name]

    def remove_adapter(self, name: str) -> FakeAdapter:
        return self.by_name.pop(name)


def import_adapter(source: Path, base: ModelManifest) -> tuple[AdapterManifest, Path]:
    """Take any directory with an `adapter.txt` for an adapter; its text is its identity."""
    path = source / "adapter.txt"
    if not path.is_file():
        raise AdapterRejected(f"{source.name}: adapter_model.safetensors is missing")
    digest = AdapterDigest(hashlib.sha256(path.read_bytes()).hexdigest())
    binding = LoraBinding("model.layers.0.self_attn.q_proj", "q_proj", 0, 8, 2.0, 4, 4, 0, 64)
    return AdapterManifest(digest, base.digest, "F32", 128, (8,), ("q_proj",), (binding,)), path


@dataclass
class RunningServer:
    """A server in a thread, and everything behind it."""

    url: str
    services: Services
    loop: asyncio.AbstractEventLoop

    @property
    def replica(self) -> ScriptedReplica:
        return self.services.bases[0].replica

    @property
    def catalog(self) -> MemoryCatalog:
        return self.services.catalog

    @property
    def adapter_root(self) -> Path:
        return self.services.settings.adapter_roots[0]

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=20)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=20)

    def write_adapter(self, content: str, directory: str | None = None) -> Path:
        path = self.adapter_root / (directory or hashlib.sha256(content.encode()).hexdigest()[:12])
        path.mkdir(exist_ok=True)
        (path / "adapter.txt").write_text(content)
        return path

    def add_adapter(self, name: str, content: str) -> AdapterDigest:
        """Put an adapter into the catalog without asking the server."""
        base = self.services.bases[0]
        source = self.write_adapter(content)
        manifest, _ = import_adapter(source, base.manifest)
        self.catalog.register_adapter(name, base.name, manifest, source)
        return manifest.digest


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = 10.0) -> None:
    """Wait for another thread to bring something about; failing to is a failure of the test, not a matter of speed."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {limit_s:g} s in vain: {what}")
        time.sleep(0.002)


@pytest.fixture(scope="session")
def eventually() -> Callable[..., None]:
    return wait_until


ServicesFactory = Callable[..., Services]
ServerFactory = Callable[..., contextlib.AbstractContextManager[RunningServer]]


@pytest.fixture(scope="session")
def make_services(
    model_dir: Path, base_manifest: ModelManifest, tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> ServicesFactory:
    def make(
        other_names: tuple[str, ...] = (),
        host_memory: Callable[[], Awaitable[Snapshot]] | None = None,
        **settings: object,
    ) -> Services:
        replica = ScriptedReplica(tiny_tokenizer)
        base = ServedBase(BASE_NAME, base_manifest, model_dir, replica, 1_700_000_000, other_names)
        served = dict.fromkeys(base.names, base_manifest.digest)
        catalog = MemoryCatalog({**served, "not/served": ModelDigest("0" * 64)})
        allowed = GatewaySettings(adapter_roots=(tmp_path_factory.mktemp("adapters"),), max_body_bytes=1 << 20)
        return Services((base,), catalog, import_adapter, replace(allowed, **settings), host_memory=host_memory)

    return make


@pytest.fixture(scope="session")
def start_server(make_services: ServicesFactory) -> ServerFactory:
    @contextlib.contextmanager
    def start(
        other_names: tuple[str, ...] = (),
        host_memory: Callable[[], Awaitable[Snapshot]] | None = None,
        **settings: object,
    ) -> Iterator[RunningServer]:
        services = make_services(other_names, host_memory, **settings)
        config = uvicorn.Config(create_app(services), port=0, log_level="error", timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_until_complete, args=(server.serve(),))
        thread.start()
        try:
            wait_until(lambda: server.started, "the server starts")
            port = server.servers[0].sockets[0].getsockname()[1]
            yield RunningServer(f"http://127.0.0.1:{port}", services, loop)
        finally:
            server.should_exit = True
            thread.join()
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()

    return start


@pytest.fixture(scope="session")
def _shared_server(start_server: ServerFactory) -> Iterator[RunningServer]:
    with start_server() as server:
        yield server


@pytest.fixture
def server(_shared_server: RunningServer) -> RunningServer:
    """The shared server with its replica's script and its catalog as at the start."""
    _shared_server.replica.reset()
    _shared_server.catalog.by_name.clear()
    _shared_server.catalog.refusal = None
    return _shared_server


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client
