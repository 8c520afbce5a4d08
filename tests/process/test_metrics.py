"""GET /metrics of a server that has done a little of everything."""

from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from supervisor.app import OPERATIONS
from supervisor.errors import CATALOGUE
from supervisor.metrics import RUNGS
from supervisor.states import JobState, WorkerState
from supervisor.worker import CauseKind
from tests.tools import weights
from tests.tools.server import SCRIPTED, RunningServer, running, wait_until


def samples(server: RunningServer) -> dict[frozenset[str], float]:
    """Values by the sample's name and its labels' values."""
    answer = server.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        frozenset({sample.name, *sample.labels.values()}): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_the_figures_tell_what_happened(tmp_path: Path) -> None:
    weights.files(tmp_path / "models/checkpoints/cat", weights.checkpoint_files("sd15"))
    with running(tmp_path, SCRIPTED, workers=2, DEVICES="cpu,cpu") as server:

        def ask(prompt: str) -> int:
            parameters = {"prompt": prompt, "num_inference_steps": 2}
            return server.generate({"checkpoint": "cat", "parameters": parameters}).status_code

        assert ask("a cat") == 200
        assert ask("fault:out_of_memory memory_fallback=tiling") == 200
        assert ask("fault:out_of_memory memory_fallback=magic") == 200
        assert ask("fault:out_of_memory") == 507
        assert ask("fault:exit") == 500
        for path in ("/nowhere", "/jobs/1", "/jobs/2"):
            assert server.client.get(path).status_code == 404
        wait_until(lambda: server.ready_count() == 2)
        found = samples(server)

    expected = {
        ("igi_http_requests_total", "/generate", "2xx"): 3,
        ("igi_http_requests_total", "/generate", "5xx"): 2,
        ("igi_http_requests_total", "/jobs/{id}", "4xx"): 2,
        ("igi_http_requests_total", "other", "4xx"): 1,
        ("igi_http_request_seconds_count", "/generate"): 5,
        ("igi_jobs_total", "finished", ""): 3,
        ("igi_jobs_total", "failed", "out_of_memory"): 1,
        ("igi_jobs_total", "failed", "poison"): 1,
        ("igi_job_queue_seconds_count",): 5,
        ("igi_job_seconds_count", "finished"): 3,
        ("igi_out_of_memory_total", "tiling"): 1,
        ("igi_out_of_memory_total", "other"): 1,
        ("igi_out_of_memory_total", "failed"): 1,
        ("igi_jobs_queued",): 0,
        ("igi_jobs_running", "0"): 0,
        ("igi_worker_state", "1", "ready"): 1,
        ("igi_worker_state", "1", "killing"): 0,
        ("igi_device_memory_bytes", "0", "total"): 8 * 2**30,
    }

    def value(*words: str) -> float | None:
        return found.get(frozenset(words))

    assert {words: value(*words) for words in expected} == expected
    assert sum((value("igi_worker_exits_total", id, "exited") or 0) for id in "01") == 2
    assert sum((value("igi_step_seconds_count", id) or 0) for id in "01") == 3
    assert sum((value("igi_model_loads_total", id) or 0) for id in "01") >= 1
    assert (value("process_resident_memory_bytes") or 0) > 0


BOUNDED = {
    "route": {operation.path for operation in OPERATIONS} | {"other"},
    "status": {"none", *(f"{hundreds}xx" for hundreds in range(1, 6))},
    "code": {"", *CATALOGUE},
    "state": {*JobState, *WorkerState},
    "reason": {*CauseKind},
    "rung": {*RUNGS, "failed", "other"},
    "kind": {"total", "used", "free"},
    "worker": {"0"},
}


def test_every_label_takes_few_values_whatever_callers_and_workers_say(tmp_path: Path) -> None:
    weights.files(tmp_path / "models/checkpoints/cat", weights.checkpoint_files("sd15"))
    odd = ["out_of_memory memory_fallback=magic", "fail code=no_such_code", "exit code=3 step=1",
           "reject code=odd field=odd", "garbage"]  # fmt: skip
    with running(tmp_path, SCRIPTED) as server:
        for number, fault in enumerate(odd):
            parameters = {"prompt": f"fault:{fault}", "num_inference_steps": 2}
            server.generate({"checkpoint": "cat", "parameters": parameters})
            server.generate({"checkpoint": f"no-such-{number}"})
            server.client.request(f"ODD{number}", f"/odd/{number}")
            server.client.get(f"/images/odd-{number}.png")
            server.client.get("/health", headers={"X-Request-Id": f"odd-{number}"})
        wait_until(lambda: server.ready_count() == 1)
        text = server.client.get("/metrics").text
    for family in text_string_to_metric_families(text):
        for sample in family.samples if family.name.startswith("igi_") else ():
            for name, value in sample.labels.items():
                assert name == "le" or value in BOUNDED[name], sample
