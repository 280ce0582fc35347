"""The workbench in a browser: jobs for one model in memory, a workspace folder, and pages made with Gradio.

`job_queue`, `workspace`, `requests` and `workbench` know no Gradio; `layout` and the files ending in `_tab` are thin.
May import every package but cli/.
"""
