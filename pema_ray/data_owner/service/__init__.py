"""The data owner's service: OpenAI's API and a playground over the one decoder.

`protocol.py` has the requests, `forms.py` turns them into generation requests and tokens into answers, `api.py` is the
application, `service.py` loads adapters and tasks. Knows the line, not the PLM.
"""
