"""The data owner's service: OpenAI's API and a playground over the one decoder.

`protocol.py` has the requests, `forms.py` makes generation requests of them and answers of tokens, `api.py` is the
application, `service.py` loads adapters and tasks. Knows the line, not
the PLM.
"""
