"""Bundles over HTTP with OpenAI's API, and files of requests.

Needs starlette, uvicorn and jinja2 (`pip install 'ryot[serve]'`), and llguidance where an answer must have a form.
"""
