const {url} = document.getElementById("api").dataset;
const narrow = matchMedia("(max-width: 52rem)").matches;
// A phone shows the groups first; the schemas stand at each route, so the list of all is left out.
SwaggerUIBundle({url, dom_id: "#api", validatorUrl: null, docExpansion: narrow ? "none" : "list", defaultModelsExpandDepth: -1});
