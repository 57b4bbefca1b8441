import subprocess
import sys

import pytest

import tiny_text
from narrows.compression import METHODS, compress, make_compressor
from narrows.errors import ConfigError, InputError

NAMES = {
    "dac", "dac-multiplicative", "dac-static", "dac-apart", "surprisal-dynamic",
    "selective-context", "random", "head", "tail", "head-tail", "llmlingua", "extractive",
    "dac-sweep",
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny_text.pair()[0]


def test_every_method_is_registered_under_its_own_name(model):
    assert set(METHODS) == NAMES
    for name in NAMES:
        assert make_compressor(name, model).method == name


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_method_keeps_the_frame_s_promises(model, name):
    text = tiny_text.MIXED
    result = compress(
        text, keep_ratio=0.5, method=name, model=model, question="tea", protect="1907"
    )
    assert result.method == name
    assert 0 < result.tokens <= result.requested_tokens
    assert "1907" in result.text
    assert result.text == "".join(text[a:b] for a, b in result.kept)
    assert "\ufffd" not in result.text
    assert result == type(result).from_json(result.to_json())
    identical = compress(text, keep_ratio=1.0, method=name, model=model)
    assert identical.text == text
    assert compress("", keep_ratio=0.5, method=name, model=model).text == ""


def test_unknown_methods_and_options_are_named(model):
    with pytest.raises(ConfigError, match="did you mean 'dac'"):
        make_compressor("dacc", model)
    for name in sorted(NAMES):
        with pytest.raises(ConfigError, match="nonsense"):
            make_compressor(name, model, nonsense=1)


def test_a_question_aware_method_without_a_question(model):
    with pytest.raises(InputError, match="question"):
        compress(tiny_text.PROSE, keep_ratio=0.5, method="extractive", model=model)


def test_importing_the_package_loads_no_torch():
    script = "import sys, narrows.compression; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
