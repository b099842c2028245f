// Requests to the server that this page came from.

/** An answer of the server, or none, as a sentence; `status` is 0 if there was no answer. */
export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

const WORDS = {
  401: "The server needs an API key, or this one is wrong.",
  404: "The server does not know this model or address.",
  413: "The request is larger than the server takes.",
  429: "The server is busy: as many requests wait as may. Try again in a moment.",
  503: "The server takes no requests now.",
  504: "The server took too long.",
};

const LOST = "The connection was lost before the text was complete.";

/** GET or POST JSON; returns the response. Throws a ServerError unless the server says OK. */
export async function ask(path, { key, body, signal } = {}) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const post = body && { method: "POST", body: JSON.stringify(body) };
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { ...post, headers, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "The server does not answer. Is it still running?");
  }
  if (!response.ok) throw new ServerError(response.status, await reason(response));
  return response;
}

async function reason(response) {
  const said = await response.json().then((content) => content?.error?.message, () => null);
  const words = WORDS[response.status] ?? `The server refused the request (${response.status}).`;
  return typeof said === "string" && said ? `${words} It said: ${said}` : words;
}

/** Yield the objects of a stream of server-sent events until [DONE]. */
export async function* events(response) {
  let held = "";
  for await (const piece of pieces(response.body.pipeThrough(new TextDecoderStream()))) {
    const blocks = (held + piece).split(/\r?\n\r?\n/);
    held = blocks.pop();
    for (const block of blocks) {
      const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:"))
        .map((line) => line.slice(5).trimStart()).join("\n");
      if (data === "[DONE]") return;
      if (!data) continue;
      const content = JSON.parse(data);
      if (content.error) throw new ServerError(0, `The server stopped: ${content.error.message}`);
      yield content;
    }
  }
  throw new ServerError(0, LOST);
}

async function* pieces(stream) {
  const reader = stream.getReader();
  try {
    while (true) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } catch (error) {
    throw error.name === "AbortError" ? error : new ServerError(0, LOST);
  } finally {
    reader.cancel().catch(() => {});
  }
}
