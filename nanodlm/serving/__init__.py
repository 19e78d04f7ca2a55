"""--mode=serve: a playground in the browser, a JSON API and OpenAI's API.

An ASGI application around `engine.Engine`, run by uvicorn. Requires
pip install -e '.[serve]'.
"""
