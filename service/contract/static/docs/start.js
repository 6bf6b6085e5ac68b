// The page of the contract. In files of its own, so that it needs no script within it and its policy allows none.

// What there is to call: the newest machine, trace and job that a reply has told of, in the place of the contract's
// examples, so that "Try it out" works on them.
const newest = new Map();
const EXAMPLES = { vm: "vm_3f9c2a1be07d4c55", tr: "tr_9d41c07a5be2f386", job: "job_5d2f80a96c1be743" };

function remember(reply) {
  const id = reply.obj?.id;
  const kind = typeof id === "string" && id.match(/^(vm|tr|job)_[0-9a-f]{16}$/)?.[1];
  if (kind) newest.set(kind, id);
  if (reply.status === 204) for (const [kind, id] of newest) if (reply.url.endsWith(`/${id}`)) newest.delete(kind);
  return reply;
}

async function withThings(request) {
  if (request.url.includes(EXAMPLES.vm) && !newest.has("vm")) {
    const { Authorization } = request.headers ?? {};
    const reply = await fetch("/v1/vms", { headers: Authorization ? { Authorization } : {} });
    const last = reply.ok && (await reply.json()).vms.at(-1);
    if (last) newest.set("vm", last.id);
  }
  for (const [kind, id] of newest) request.url = request.url.replace(EXAMPLES[kind], id);
  return request;
}

// Operations by any word of theirs: path, method, name, summary, tag.
function opsFilter(tagged, phrase) {
  const words = phrase.toLowerCase().split(/\s+/).filter(Boolean);
  const found = (...said) => words.every((word) => said.join(" ").toLowerCase().includes(word));
  const isFound = (tag, { path, method, operation }) =>
    found(tag, path, method, operation.operationId, operation.summary);
  return tagged
    .map((group, tag) => group.update("operations", (list) => list.filter((each) => isFound(tag, each.toJS()))))
    .filter((group, tag) => group.get("operations").size || (tag === SOCKETS && found(tag, "websocket")));
}

// A refusal is a line, which opens.
const Refusals = (Original, { React }) =>
  function Reply(props) {
    const [open, setOpen] = React.useState(false);
    if (props.code < "400") return React.createElement(Original, props);
    const h = React.createElement;
    const title = props.response.get("description");
    const inner = open && h("table", { className: "responses-table" }, h("tbody", null, h(Original, props)));
    const fold = h("details", { onToggle: (event) => setOpen(event.target.open) }, h("summary", null, title), inner);
    const code = h("td", { className: "response-col_status" }, props.code);
    return h("tr", { className: "response refusal" }, code, h("td", { colSpan: 2 }, fold));
  };

// The tag without operations, which has the WebSocket.
const SOCKETS = "introspection";
const sockets = element("section", "");
sockets.id = "websockets";

const WithSockets = (Original, { React }) =>
  function Tag(props) {
    if (props.tag !== SOCKETS) return React.createElement(Original, props);
    const place = React.createElement("div", { ref: (node) => node?.append(sockets) });
    return React.createElement(Original, props, props.children, place);
  };

function element(name, text, ...inner) {
  const made = document.createElement(name);
  if (text) made.textContent = text;
  made.append(...inner);
  return made;
}

function row(...cells) {
  return element("tr", "", ...cells.map((text) => element("td", text)));
}

// What OpenAPI has no operations for: WebSockets, from `x-websockets`.
function showSockets(contract) {
  const messages = (title, from) => {
    const list = from.oneOf.map(({ $ref }) => {
      const schema = contract.components.schemas[$ref.split("/").at(-1)];
      const rows = Object.entries(schema.properties).map(([name, member]) =>
        row(name, member.const ?? member.type ?? "", member.description),
      );
      const shown = schema.examples ? [element("pre", JSON.stringify(schema.examples[0], null, 1))] : [];
      const name = schema.properties.type.const;
      const summary = element("summary", `${name}: ${schema.description}`);
      return element("details", "", summary, element("table", "", ...rows), ...shown);
    });
    return [element("h4", title), ...list];
  };
  for (const [path, socket] of Object.entries(contract["x-websockets"] ?? {})) {
    sockets.append(
      element("h3", `WebSocket: ${socket.summary}`),
      element("p", `${path} with the subprotocol ${socket.subprotocol}; permission ${socket["x-permission"]}.`),
      element("p", socket.description),
      ...messages("It takes", socket.receives),
      ...messages("It sends", socket.sends),
    );
  }
}

// Parameters that a call must have begin with their examples; Swagger UI takes those of parameters, and not of schemas.
function withExamples(contract) {
  const operations = Object.values(contract.paths).flatMap((item) => Object.values(item));
  const parameters = operations.flatMap((operation) => operation.parameters ?? []);
  for (const parameter of [...Object.values(contract.components.parameters), ...parameters]) {
    const schema = parameter.schema?.$ref ? contract.components.schemas[parameter.schema.$ref.split("/").at(-1)] : {};
    const shown = parameter.schema?.examples ?? schema.examples;
    if (parameter.required && shown) parameter.example = shown[0];
  }
  contract.info.description += "\n[The contract as a file](/openapi.json)";
  return contract;
}

const contract = await (await fetch("/openapi.json")).json();
showSockets(contract);
SwaggerUIBundle({
  spec: withExamples(contract),
  dom_id: "#swagger-ui",
  layout: "BaseLayout",
  deepLinking: true,
  filter: true,
  docExpansion: "list",
  defaultModelsExpandDepth: 0,
  showExtensions: true,
  showCommonExtensions: true,
  presets: [SwaggerUIBundle.presets.apis, SwaggerUIBundle.SwaggerUIStandalonePreset],
  plugins: [{ fn: { opsFilter }, wrapComponents: { response: Refusals, OperationTag: WithSockets } }],
  requestInterceptor: withThings,
  responseInterceptor: remember,
  onComplete: () => {
    const filter = document.querySelector(".operation-filter-input");
    filter?.setAttribute("placeholder", "Filter: a path, a verb, a word of a name");
  },
});
