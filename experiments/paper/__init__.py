"""The paper's tables and figures, and studies of what it leaves open, from models that are trained once and shared.

`plan` says which models each needs, `runner` trains and attacks them, `tables`, `figures` and `page` show what came out.
"""
