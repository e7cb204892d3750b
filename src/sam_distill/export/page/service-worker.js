// Service worker with two purposes: it caches the page's files, so that the page works offline; and it adds two headers
// to every response, without which browsers do not share memory between threads and the model runs in one thread only.

const CACHE_NAME = "sam-distill";
const INITIAL_FILES = ["./", "index.html", "style.css", "app.js", "pixels.js"]; // fetched before it is active

self.addEventListener("install", (event) => {
  self.skipWaiting();
  event.waitUntil(caches.open(CACHE_NAME).then((cache) => cache.addAll(INITIAL_FILES)));
});
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));
self.addEventListener("fetch", (event) => {
  if (event.request.method === "GET" && new URL(event.request.url).origin === location.origin) {
    event.respondWith(fetchOrCached(event.request));
  }
});

/** Return the response from the network, since files may have been exported again, or offline from the cache. */
async function fetchOrCached(request) {
  const cache = await caches.open(CACHE_NAME);
  try {
    const response = await fetch(request, { cache: "no-cache" }); // the browser's own cache must ask the server, too
    if (response.ok) await cache.put(request, response.clone());
    return withIsolationHeaders(response);
  } catch (error) {
    const response = await cache.match(request);
    if (!response) throw error;
    return withIsolationHeaders(response);
  }
}

/** Return the response with the headers that make the page cross-origin isolated. */
function withIsolationHeaders(response) {
  const headers = new Headers(response.headers);
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
}
