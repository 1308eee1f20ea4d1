"""The tests. What is here holds in every process that imports a module of them, so in ranks as well."""

import torch
import torch._dynamo.trace_rules

if torch.__version__.startswith("2.11."):
    # Its Dynamo breaks the graph inside of funcol.all_gather_tensor along a dimension other than 0. The tests are about
    # what becomes of the graph that later versions make of it, so it is let in.
    rules = torch._dynamo.trace_rules
    rules.manual_torch_name_rule_map["torch._utils._maybe_view_chunk_cat"] = rules.UserFunctionVariable
    rules.get_torch_obj_rule_map.cache_clear()
