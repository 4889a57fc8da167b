"""Let llama.cpp (the package xllamacpp) continue texts greedily: python llama_cpp.py FILE < TEXTS.json."""

import json
import sys

import xllamacpp

parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[1]
parameters.n_ctx = 512
parameters.n_parallel = 1
parameters.cpuparams.n_threads = 1
parameters.warmup = False
server = xllamacpp.Server(parameters)
answers = []
for text in json.load(sys.stdin):
    result = server.handle_completions({"prompt": text, "max_tokens": 4, "temperature": 0, "logprobs": 1})
    tokens = result["choices"][0]["logprobs"]["content"]
    answers.append(
        {
            "prompt_tokens": result["usage"]["prompt_tokens"],
            "ids": [token["id"] for token in tokens],
            "logps": [token["logprob"] for token in tokens],
        }
    )
sys.stdout.write(json.dumps(answers) + "\n")
