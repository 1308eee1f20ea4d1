"""The tests. What is here holds in every process that imports a module of them, so in ranks as well."""

import torch
import torch._dynamo.config

if torch.__version__.startswith("2.11."):
    # Its Dynamo breaks the graph inside of funcol.all_gather_tensor along a dimension other than 0. The tests are about
    # what becomes of the graph that later versions make of it, so it is let in.
    torch._dynamo.config.dont_skip_tracing = True
