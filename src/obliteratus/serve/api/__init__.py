"""An OpenAI-compatible HTTP server on one loaded model: requests, answers, errors, and the web application.

`requests`, `answers` and `errors` know no HTTP library. May import every package but cli/.
"""
