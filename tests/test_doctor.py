"""`qtool doctor`: every dependency and extra is looked at, the hub is asked, and what is wrong is exit 4."""

from __future__ import annotations

import json
import re
import socket
from importlib.metadata import requires

import pytest
from packaging.requirements import Requirement

from qtool.extras import DISTRIBUTION, EXTRAS
from tests.scoring.servers import Reply, serving
from tests.without import qtool_without

OFFLINE = {"HF_HUB_OFFLINE": "1"}


def doctor(*missing, **environment):
    """Exit code and findings where `missing` modules are not installed."""
    done = qtool_without(missing, "doctor", "--json", **environment)
    findings = {finding["subject"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert done.stderr == ""
    assert all(finding["advice"] for finding in findings.values() if finding["state"] in ("wrong", "missing"))
    return done.returncode, findings


def wrong(findings):
    return [subject for subject, finding in findings.items() if finding["state"] == "wrong"]


def test_every_dependency_extra_and_resource_is_listed_and_nothing_is_wrong():
    code, findings = doctor(**OFFLINE)
    names = {Requirement(each).name for each in requires(DISTRIBUTION) if "'dev'" not in each}
    extras = {f"[{name}]" for name in EXTRAS}
    machine = {"python", "cpu", "gpu", "triton", "torchvision", "free disk here", "free memory", "hub", "hub token"}
    assert set(findings) >= names | extras | machine | {"llama-server", "llama-quantize"}
    assert findings["transformers"]["state"] == "ok"
    assert (wrong(findings), code) == ([], 0)


@pytest.mark.parametrize("extra", EXTRAS.values(), ids=lambda extra: extra.name)
def test_a_missing_extra_is_named_with_what_it_enables_and_is_not_wrong(extra):
    code, findings = doctor(*extra.packages, **OFFLINE)
    finding = findings[f"[{extra.name}]"]
    assert (code, finding["state"]) == (0, "missing")
    assert extra.enables in finding["detail"]
    assert finding["advice"] == f"pip install 'qtool-retrieval[{extra.name}]'"
    for package in extra.packages.values():
        assert findings[package]["state"] == "missing"


@pytest.mark.parametrize("module", ["numba", "scipy", "gguf", "PIL", "tokenizers"])
def test_a_missing_dependency_is_wrong(module):
    code, findings = doctor(module, **OFFLINE)
    (subject,) = wrong(findings)
    assert code == 4
    assert findings[subject]["advice"] == "pip install qtool-retrieval"


def test_the_extras_are_those_of_the_distribution():
    """Import names and pip's names, by hand in `EXTRAS`, by pip's rules in the metadata."""
    for extra in EXTRAS.values():
        found = {
            requirement.name
            for requirement in map(Requirement, requires(DISTRIBUTION))
            if requirement.marker and requirement.marker.evaluate({"extra": extra.name})
        }
        assert set(extra.packages.values()) == found


@pytest.mark.parametrize("status", [200, 401, 405])
def test_a_hub_that_answers_is_fine(status):
    with serving(lambda *_: Reply("", status)) as hub:
        code, findings = doctor(HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="")
    assert (findings["hub"]["state"], findings["hub"]["detail"], code) == ("ok", f"{hub.url} answers", 0)
    assert [path for path, _, _ in hub.asked] == ["/"]


def test_a_hub_that_fails_or_is_not_there_is_wrong():
    with serving(lambda *_: Reply("", 503)) as hub:
        code, findings = doctor(HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="")
    assert (wrong(findings), code) == (["hub"], 4)
    assert findings["hub"]["detail"] == f"{hub.url} answers with status 503"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
    code, findings = doctor(HF_ENDPOINT=address, HF_HUB_OFFLINE="")
    assert (wrong(findings), code) == (["hub"], 4)
    assert re.match(rf"{address} cannot be reached: \S", findings["hub"]["detail"])
    assert "HF_HUB_OFFLINE=1" in findings["hub"]["advice"]


def test_offline_the_hub_is_not_asked():
    with serving(lambda *_: Reply("")) as hub:
        code, findings = doctor(HF_ENDPOINT=hub.url, **OFFLINE)
    assert hub.asked == []
    assert (findings["hub"]["state"], findings["hub"]["detail"], code) == ("info", "offline: HF_HUB_OFFLINE is set", 0)
