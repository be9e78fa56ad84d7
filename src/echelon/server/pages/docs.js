const {url} = document.getElementById("api").dataset;
SwaggerUIBundle({url, dom_id: "#api", validatorUrl: null});
