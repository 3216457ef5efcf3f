import torch
UNARY=("tanh","sigmoid","softplus","exp","log","expm1","log1p","sin","cos","sqrt","rsqrt","reciprocal","pow","erf","gelu","gelu_tanh","silu")
def _pad(x,K):
    return torch.cat([x,x.new_zeros(K+1-x.shape[0],*x.shape[1:])]) if x.shape[0]<K+1 else x
def mul(a,b,order=None):
    K=max(a.shape[0],b.shape[0])-1 if order is None else order
    out=[]
    for k in range(K+1):
        t=[a[j]*b[k-j] for j in range(k+1) if j<a.shape[0] and k-j<b.shape[0]]
        out.append(sum(t) if t else torch.zeros_like(a[0]*b[0]))
    return torch.stack(out)
def div(a,b,order=None):
    K=max(a.shape[0],b.shape[0])-1 if order is None else order
    y=[]
    for k in range(K+1):
        n=a[k] if k<a.shape[0] else torch.zeros_like(a[0])
        for j in range(k): 
            if k-j<b.shape[0]: n=n-y[j]*b[k-j]
        y.append(n/b[0])
    return torch.stack(torch.broadcast_tensors(*y))
def unary(x,name,order=None,param=0.0):
    K=x.shape[0]-1 if order is None else order
    x=_pad(x,K)
    def integ(y0,g):
        y=[y0]
        for k in range(1,K+1): y.append(sum(j*x[j]*g[k-j] for j in range(1,k+1))/k)
        return torch.stack(y)
    if name=="exp":
        y=[x[0].exp()]
        for k in range(1,K+1): y.append(sum(j*x[j]*y[k-j] for j in range(1,k+1))/k)
        return torch.stack(y)
    if name=="reciprocal": return div(torch.ones_like(x[:1]),x,K)
    if name=="log": return integ(x[0].log(),unary(x,"reciprocal"))
    if name=="tanh":
        e=unary(-2*x,"exp"); e1=torch.cat([e[:1]+1,e[1:]]); r=2*unary(e1,"reciprocal"); return torch.cat([r[:1]-1,r[1:]])
    if name=="sigmoid":
        e=unary(-x,"exp"); e1=torch.cat([e[:1]+1,e[1:]]); return unary(e1,"reciprocal")
    if name=="silu": return mul(x,unary(x,"sigmoid"))
    if name=="softplus": return integ(torch.nn.functional.softplus(x[0]),unary(x,"sigmoid"))
    if name in("sin","cos"):
        s,c=[x[0].sin()],[x[0].cos()]
        for k in range(1,K+1):
            s.append(sum(j*x[j]*c[k-j] for j in range(1,k+1))/k); c.append(-sum(j*x[j]*s[k-j] for j in range(1,k+1))/k)
        return torch.stack(s if name=="sin" else c)
    if name=="pow": return unary(param*unary(x,"log"),"exp")
    if name=="sqrt": return unary(x,"pow",None,.5)
    if name=="rsqrt": return unary(x,"pow",None,-.5)
    if name=="erf": return integ(x[0].erf(),2/3.141592653589793**.5*unary(-mul(x,x),"exp"))
    if name=="gelu":
        e=.5*unary(x/2**.5,"erf"); return mul(x,torch.cat([e[:1]+.5,e[1:]]))
    raise KeyError(name)
