"""What the help of each command ends with: examples that can be copied, and the pages that say more."""

from __future__ import annotations

from typing import Final

EXAMPLES: Final = {
    "quantize": """
        qtool quantize Qwen/Qwen3-Reranker-0.6B -o reranker-nvfp4
        qtool quantize ./my-embedder --task embed -o my-embedder-nvfp4
        qtool quantize Qwen/Qwen3-VL-Reranker-2B --dry-run
        qtool quantize Qwen/Qwen3-VL-Reranker-2B -o reranker-nvfp4 --stream
    """,
    "calibrate": """
        qtool calibrate Qwen/Qwen3-Reranker-0.6B -o stats.gguf
        qtool calibrate ./my-embedder --data mine.jsonl --data general-text -o stats.gguf --hessians hessians.safetensors
        qtool calibrate qtool-demo-reranker --limit 32 --predict
    """,
    "tune": """
        qtool tune Qwen/Qwen3-Reranker-0.6B --budget 5.0bpw -o tuned
        qtool tune ./my-reranker --max-drift 0.02 --data mine.jsonl -o tuned
        qtool tune Qwen/Qwen3-VL-Embedding-2B --budget 5.5bpw --dry-run
    """,
    "convert-gguf": """
        qtool convert-gguf Qwen/Qwen3-Reranker-0.6B -o reranker.gguf --outtype q8_0
        qtool convert-gguf Qwen/Qwen3-VL-Embedding-2B -o gguf --outtype f16,q8_0
        qtool convert-gguf ./my-embedder -o embedder-q4.gguf --outtype q4_k_m --imatrix stats.gguf
        qtool convert-gguf ./reranker-nvfp4 --dry-run
    """,
    "inspect": """
        qtool inspect model.gguf
        qtool inspect Qwen/Qwen3-Reranker-0.6B
        qtool inspect hf://org/name/model.gguf --task rerank --json
    """,
    "repair-gguf": """
        qtool repair-gguf broken.gguf -o fixed.gguf
        qtool repair-gguf broken.gguf -o fixed.gguf --base Qwen/Qwen3-Reranker-0.6B
    """,
    "score": """
        qtool score qtool-demo-reranker --panel demo-text --limit 2
        qtool score hf://org/name/model-Q8_0.gguf --panel panel.jsonl -o scores.jsonl
        qtool score http://localhost:8000 --panel panel.jsonl --engine vllm -o scores.jsonl
    """,
    "embed": """
        qtool embed qtool-demo-embedder --panel demo-text --limit 2 -o vectors.npy
        qtool embed ./my-embedder --texts lines.txt -o vectors.npy --dim 256
    """,
    "verify": """
        qtool verify ./reranker-nvfp4 --reference Qwen/Qwen3-Reranker-0.6B -o report
        qtool verify model.gguf --reference ./my-model --panel panel.jsonl -o report
        qtool verify ./quants --reference Qwen/Qwen3-Reranker-0.6B -o reports
        qtool verify http://localhost:8000 --reference ./my-model --engine vllm -o report
        qtool verify ./reranker-nvfp4 --reference ./my-model --structure-only --weights
    """,
    "merge-reports": """
        qtool merge-reports shard-1 shard-2 shard-3 -o report
    """,
    "compare": """
        qtool compare report-max report-calibrated -o comparison
        qtool compare reports --baseline reports/model-Q8_0
        qtool compare nightly --baseline released --fail-if-worse log_odds_rmse --fail-if-worse kendall_tau
    """,
    "serve-command": """
        qtool serve-command model.gguf --engine llama-server --port 8080
        qtool serve-command ./reranker-nvfp4 --engine vllm
    """,
    "demo": """
        qtool demo
        qtool demo -o /tmp/demo -v
    """,
    "recipes": """
        qtool recipes
        qtool recipes nvfp4-w4a16 > mine.yaml
    """,
    "doctor": """
        qtool doctor
        qtool doctor --json
    """,
}

DOCS: Final = {
    "quantize": "docs/recipes.md, docs/hub.md",
    "calibrate": "docs/calibration.md",
    "tune": "docs/calibration.md, docs/recipes.md",
    "convert-gguf": "docs/gguf.md, docs/calibration.md, docs/hub.md",
    "inspect": "docs/findings.md",
    "repair-gguf": "docs/broken-gguf.md",
    "score": "docs/scoring.md",
    "embed": "docs/scoring.md",
    "verify": "docs/verify.md, docs/ci.md",
    "merge-reports": "docs/ci.md",
    "compare": "docs/compare.md, docs/metrics.md",
    "serve-command": "docs/serving.md, docs/gguf.md",
    "demo": "docs/demo.md",
    "recipes": "docs/recipes.md",
    "doctor": "docs/cli.md",
}


def epilog(command: str) -> str:
    """The end of a command's help."""
    # Typer keeps the lines of a paragraph that begins with a backspace.
    lines = [line.strip() for line in EXAMPLES[command].strip().splitlines()]
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines), "", f"Docs: {DOCS[command]}"])
