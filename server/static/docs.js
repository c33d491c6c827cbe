/* /openapi.json to read and to try out. Where it needs a key, the one given for it is Swagger UI's too, under Authorize. */
"use strict";
import { Unreachable, askForJson, keyInUse, sleep } from "./session.js";

const place = document.getElementById("swagger-ui");

async function load() {
  for (;;) {
    try {
      return await askForJson("openapi.json");
    } catch (error) {
      const why = error instanceof Unreachable ? "The server does not answer." : `The server answered: ${error.message}`;
      place.replaceChildren(Object.assign(document.createElement("p"), { className: "bad", textContent: why }));
      await sleep(3);
    }
  }
}

const spec = await load();
const ui = SwaggerUIBundle({
  spec, domNode: place, deepLinking: true, validatorUrl: null, tryItOutEnabled: true,
  onComplete() {
    const key = keyInUse();
    if (key) for (const name of Object.keys(spec.components.securitySchemes || {})) ui.preauthorizeApiKey(name, key);
  },
});
