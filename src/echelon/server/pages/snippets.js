// The same call in several languages. JSON strings, lists and numbers are valid Python.
import { tr } from "./common.js";

const indented = (value) => JSON.stringify(value, null, 2);

/** The body that every snippet sends. */
export function bodyOf(query, documents, topN) {
  const body = { query, documents };
  if (topN !== null) body.top_n = topN;
  return body;
}

// A here-document: the shell interprets nothing in it.
function curl({ url, body, keyed }) {
  const key = keyed ? ' \\\n  -H "Authorization: Bearer $ECHELON_API_KEY"' : "";
  return `curl -s ${quoted(`${url}/v2/rerank`)} \\\n  -H 'Content-Type: application/json'${key} \\\n  --data-binary @- <<'JSON'\n${indented(body)}\nJSON\n`;
}

function requests(call) {
  const { url, body, keyed } = call;
  const headers = keyed ? '\n    headers={"Authorization": "Bearer " + os.environ["ECHELON_API_KEY"]},' : "";
  return `${keyed ? "import os\n\n" : ""}import requests

response = requests.post(
    ${JSON.stringify(`${url}/v2/rerank`)},${headers}
    json=${nested(body)},
    timeout=60,
)
response.raise_for_status()
for result in response.json()["results"]:
    print(result["index"], result["relevance_score"])
`;
}

function cohere({ url, body, keyed }) {
  const key = keyed ? 'os.environ["ECHELON_API_KEY"]' : '"no key is needed"';
  return `${keyed ? "import os\n\n" : ""}import cohere

client = cohere.ClientV2(${key}, base_url=${JSON.stringify(url)})
response = client.rerank(
    model="any",
${fields(body)}
)
for result in response.results:
    print(result.index, result.relevance_score)
`;
}

function echelon({ model, body }) {
  return `from echelon import Reranker

with Reranker(${JSON.stringify(model || "demo")}) as reranker:  # ${tr("in this process, without a server")}
    ranking = reranker.rank(
${fields(body, "        ")}
    )
for result in ranking.results:
    print(result.index, result.score, result.logit)
`;
}

export const LANGUAGES = { curl, requests, Cohere: cohere, Echelon: echelon };

function fields(body, indent = "    ") {
  return Object.entries(body).map(([name, value]) => `${indent}${name}=${nested(value, indent)},`).join("\n");
}

const nested = (value, indent = "    ") => indented(value).replaceAll("\n", `\n${indent}`);
const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
